"""The lm-eval adapter: likelihoods against a direct computation and `transformers`, and a task of our own."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # a local file needs nobody
pytest.importorskip("lm_eval")

from lm_eval.api.registry import Registry, get_model  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moe_jax.errors import UserError  # noqa: E402
from moe_jax.evaluation.harness import MoeJax  # noqa: E402
from moe_jax.inference.session import shipped  # noqa: E402
from tests import reference  # noqa: E402
from tests.tiny import TINY, write_tiny  # noqa: E402

PAIRS = [("abc", "def"), ("", "some text"), ("a longer context, with more in it", " x"), ("b ", "cc")]
DOCUMENTS = [{"question": q, "choices": [" yes", " no"], "answer": i % 2} for i, q in enumerate("abcd")]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why?"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, max_seq_len=64))


def load(directory, batch_size: int | str = 1, **fields) -> Any:
    # As lm_eval makes it of --model_args.
    arguments = {"checkpoint": str(directory), "predictor": "router", "prefetch.horizon": 2, **fields}
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    return MoeJax.create_from_arg_string(text, {"batch_size": batch_size, "device": None})


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def direct(directory, a, context: list[int], scored: list[int]) -> tuple[float, bool]:
    logits, _ = reference.forward(a, reference.read(directory), (context + scored)[:-1])
    logits = logits[-len(scored) :]
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalised[np.arange(len(scored)), scored].sum(), bool((logits.argmax(-1) == scored).all())


def test_likelihoods_are_those_of_a_direct_computation(directory):
    lm = load(directory)
    encode = lm.model.tokenizer.encode
    a = lm.model.checkpoint.architecture
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(PAIRS, found, strict=True):
        head = encode(context.rstrip()) or [a.bos_id]  # spaces at its end are moved to the continuation
        tokens = encode(context + continuation) if context else head + encode(continuation)
        expected, best = direct(directory, a, head, tokens[len(head) :])
        assert likelihood == pytest.approx(expected, abs=2e-4) and greedy == best
    # What greedy decoding gives is recognised as such.
    generation = lm.model.start(["abc"], 5)
    assert list(generation)
    ids = generation.outputs[0].token_ids
    [(_, greedy)] = lm._loglikelihood_tokens([(None, encode("abc"), ids)], disable_tqdm=True)
    assert greedy


def test_rolling_likelihoods_and_contexts_that_are_too_long(directory):
    lm = load(directory)
    a, text = lm.model.checkpoint.architecture, "0123456789" * 9
    ids = lm.tok_encode(text, add_special_tokens=False)
    [found] = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    first = direct(directory, a, [a.bos_id], ids[:64])[0]
    rest = direct(directory, a, ids[25:64], ids[64:])[0]  # 64 tokens of context and continuation in all, less one
    assert found == pytest.approx(first + rest, abs=2e-3)
    [(likelihood, _)] = lm.loglikelihood(requests((text, "ab")), disable_tqdm=True)
    cut = (lm.tok_encode(text) + lm.tok_encode("ab", add_special_tokens=False))[-65:]
    assert likelihood == pytest.approx(direct(directory, a, cut[:-2], cut[-2:])[0], abs=2e-4)


def test_modes_apply_and_batches_change_nothing(directory):
    exact = load(directory).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    together, apart = (
        load(directory, size, execution="speculative").loglikelihood(requests(*PAIRS), disable_tqdm=True)
        for size in (4, "1")
    )
    assert [greedy for _, greedy in together] == [greedy for _, greedy in apart]
    np.testing.assert_allclose([a for a, _ in together], [b for b, _ in apart], atol=1e-4)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(exact, together, strict=True))


def test_texts_end_at_a_stop(directory):
    lm = load(directory)
    whole, cut = (
        lm.generate_until(requests(("abc", {"max_gen_toks": 12, "until": until})), disable_tqdm=True)[0]
        for until in ([], None)
    )
    assert whole == cut and len(whole) > 4
    [stopped] = lm.generate_until(requests(("abc", {"max_gen_toks": 12, "until": [whole[3]]})), disable_tqdm=True)
    assert stopped == whole[: whole.index(whole[3])]


def test_repeats_of_a_sampled_request_are_texts_of_their_own(directory):
    sampled = ("abc", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    three, again, other = (
        load(directory, **fields).generate_until(requests(sampled, sampled, sampled), disable_tqdm=True)
        for fields in ({}, {}, {"seed": 7})
    )
    assert len(set(three)) == 3 and three == again
    assert not set(three) & set(other)


def test_mistakes_are_said(directory):
    with pytest.raises(UserError, match="unknown config field exection; did you mean execution"):
        load(directory, exection="exact")
    with pytest.raises(UserError, match="no such configuration document"):
        load(directory, config="nowhere.py")
    with pytest.raises(UserError, match="seed=one is no whole number"):
        load(directory, seed="one")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A model with a chat template, and a bos that it puts in front of every prompt."""
    directory = write_tiny(tmp_path_factory.mktemp("chat"), dataclasses.replace(TINY, max_seq_len=256))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"add_bos_token": True, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_chat_is_that_of_the_tokenizer_with_one_bos(chat_model):
    lm = load(chat_model)
    text = lm.apply_chat_template(CHAT)
    assert text == "<s>[system] Be brief.</s>[user]  Why?</s>[assistant] "
    assert lm.tok_encode(text) == lm.model.tokenizer.apply_chat(CHAT) and lm.tok_encode(text).count(0) == 1
    assert lm.tok_encode("abc")[0] == 0
    assert lm.chat_template(True) == TEMPLATE and lm.tokenizer_name == str(chat_model)


@pytest.mark.parametrize("trim", ["", " | trim"])
@pytest.mark.parametrize("begun", ["s", "So, ", " So\n"])
def test_an_answer_that_a_task_has_begun_goes_on(chat_model, tmp_path, trim, begun):
    transformers = pytest.importorskip("transformers")
    directory = shutil.copytree(chat_model, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE.replace("m.content", "m.content" + trim))
    chat = [*CHAT, {"role": "assistant", "content": begun}]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert load(directory).apply_chat_template(chat, add_generation_prompt=False) == expected
    assert expected.endswith(begun.strip() if trim else begun) and chat[-1]["content"] == begun


def test_chat_mistakes(directory, chat_model, tmp_path):
    lm = load(directory)
    for ask in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template(CHAT)):
        with pytest.raises(UserError, match="has no chat template; leave out .*--apply_chat_template"):
            ask()
    with pytest.raises(UserError, match="only the default template is used"):
        load(chat_model).chat_template("rag")
    other = shutil.copytree(chat_model, tmp_path / "model")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="leaves out the answer"):
        load(other).apply_chat_template([*CHAT, {"role": "assistant", "content": "So"}], add_generation_prompt=False)


@pytest.fixture
def local_task(tmp_path):
    """A folder with a task that needs no download."""
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))  # YAML too
    return tmp_path


def test_a_task_that_needs_no_download(directory, local_task):
    lm = load(directory)
    found: Any = simple_evaluate(
        lm,
        tasks=["local"],
        task_manager=TaskManager(include_path=str(local_task), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    likelihoods = lm.loglikelihood(
        requests(*((f"{d['question']}?", choice) for d in DOCUMENTS for choice in d["choices"])), disable_tqdm=True
    )
    best = np.array([value for value, _ in likelihoods]).reshape(-1, 2).argmax(1)
    assert found["results"]["local"]["acc,none"] == np.mean(best == [d["answer"] for d in DOCUMENTS])
    assert get_model("moe_jax") is MoeJax


def test_a_task_in_the_form_of_a_chat(chat_model, local_task):
    lm = load(chat_model)
    found: Any = simple_evaluate(
        lm,
        tasks=["local"],
        task_manager=TaskManager(include_path=str(local_task), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    contexts = [lm.apply_chat_template([{"role": "user", "content": f"{d['question']}?"}]) for d in DOCUMENTS]
    asked = [sample["arguments"][0][0] for sample in found["samples"]["local"]]
    assert asked == contexts


def test_lm_eval_gets_it_from_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"]["lm_eval.models"].items()
    registry = Registry("model")  # as an lm-eval that looks for plugins fills its own
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert registry.get("moe_jax") is MoeJax


@pytest.mark.slow
def test_the_command(directory, local_task):
    model = f"checkpoint={directory},predictor=router,prefetch.horizon=2,execution=speculative_gated"
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model=moe_jax", "--tasks=local"]
    command += [f"--include_path={local_task}", f"--model_args={model}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "|local|" in done.stdout.replace(" ", ""), done.stderr
    command[-1] = "--model_args=checkpoint=nowhere"
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and "nowhere" in wrong.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stderr


def test_other_programs_do_not_load_lm_eval():
    code = "import sys; print('moe_jax' in sys.modules, 'lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "lm_eval"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.slow
def test_likelihoods_are_those_of_transformers_on_the_shipped_model():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    lm = load(shipped("model"), predictor="none")
    pairs = [("def read_file(path):\n    ", "return open(path).read()"), ("And the LORD said unto", " Moses, Go in")]
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(shipped("model"), dtype=torch.float32).eval()
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        head, scored = lm._encode_pair(context, continuation)
        with torch.no_grad():
            logits = model(torch.tensor([head + scored])).logits[0, len(head) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[torch.arange(len(scored)), torch.tensor(scored)].sum().item()
        assert likelihood == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(scored)).all())
