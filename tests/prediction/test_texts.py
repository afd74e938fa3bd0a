"""Which text becomes which window, and that test texts are never learned from."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import texts


def encode(text: str) -> list[int]:
    return [0, *text.encode()]


def write(folder, name, lines, word):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{word} {i:04d} {'abcdefghij' * 5}\n" for i in range(lines)))
    return path


def test_windows_hold_the_text_in_order(tmp_path):
    path = write(tmp_path, "a.txt", 5, "line")
    plan = texts.plan(encode, [path], window=64)
    ids = encode(path.read_text())
    joined = np.concatenate([tokens[:n] for tokens, n in zip(plan.tokens, plan.lengths, strict=True)])
    np.testing.assert_array_equal(joined, ids[: len(joined)])
    assert len(ids) - len(joined) < texts.SHORTEST
    assert (plan.lengths[:-1] == 64).all() and (plan.tokens[-1, plan.lengths[-1] :] == 0).all()


def test_every_source_gets_an_equal_share_of_the_budget(tmp_path):
    for i in range(20):
        write(tmp_path / "many", f"{i}.py", 40, f"many{i}")
    big = write(tmp_path, "big.txt", 3000, "big")
    plan = texts.plan(encode, [tmp_path / "many", big], window=64, max_tokens=8000)
    from_big = np.isin(plan.documents, [i for i, name in enumerate(plan.names) if name.startswith("big")])
    assert plan.lengths.sum() <= 8000
    assert plan.lengths[from_big].sum() == pytest.approx(4000, abs=64)
    assert plan.lengths[~from_big].sum() == pytest.approx(4000, abs=64)


def test_the_plan_depends_on_the_seed_alone(tmp_path):
    for i in range(20):
        write(tmp_path, f"{i}.py", 40, f"text{i}")
    make = lambda seed: texts.plan(encode, [tmp_path], 64, 8000, seed).digest()
    assert make(0) == make(0) != make(1)


def test_a_budget_in_the_order_of_the_files_changes_nothing_where_it_is_large_enough(tmp_path):
    for i in range(20):
        write(tmp_path / "a", f"{i:02d}.py", 40, f"text{i}")
    single = write(tmp_path, "b.txt", 600, "more")  # two documents
    whole = texts.plan(encode, [tmp_path / "a", single], 64)
    bounded = lambda most: texts.plan(encode, [tmp_path / "a", single], 64, most, 3, in_order=True)
    assert bounded(2 * whole.lengths.sum()).digest() == whole.digest()
    assert bounded(2 * whole.lengths.sum()).names == whole.names
    few = bounded(12000)
    assert 11000 < few.lengths.sum() <= 12000
    assert few.names == sorted(few.names) and few.names[:3] != whole.names[:3]  # from all over the folder


def test_documents_that_share_lines_with_a_test_text_are_left_out(tmp_path):
    write(tmp_path / "train", "seen.py", 40, "seen")
    write(tmp_path / "train", "other.py", 40, "other")
    (tmp_path / "tests").mkdir()
    test = tmp_path / "tests" / "test.txt"
    # As it may stand in a test text: indented, with other numbering before it, among other lines.
    test.write_text(
        "x\n" + "".join("   7 " + line + "\n" for line in (tmp_path / "train/seen.py").read_text().split("\n"))
    )
    unlike = tmp_path / "unlike.txt"
    unlike.write_text("nothing of it is in the training text, not even a part of one line of it\n")
    (tmp_path / "train/other.py").write_text("".join(f"{'qwertz' * 8} {i:04d}\n" for i in range(40)))
    assert texts.plan(encode, [tmp_path / "train"], 64, exclude=[test]).names == ["other.py#0"]
    assert texts.plan(encode, [tmp_path / "train"], 64, exclude=[test.parent]).names == ["other.py#0"]
    assert len(texts.plan(encode, [tmp_path / "train"], 64, exclude=[unlike]).names) == 2


WORDS = ["sonne", "mond", "wald", "nacht", "licht", "wind", "see", "berg", "haus", "weg"]


def chosen(seed: int, count: int, among=WORDS) -> list[str]:
    return [among[i] for i in np.random.default_rng(seed).integers(0, len(among), count)]


def verse(seed: int) -> str:
    return "\n".join(" ".join(chosen(seed + i, 4)) for i in range(0, 30000, 100))


def one_line(seed: int) -> str:
    return " ".join(chosen(seed, 4000))


def chinese(seed: int) -> str:
    return "\n".join("".join(chosen(seed + i, 24, "天地玄黄宇宙洪荒日月盈昃辰宿列张")) for i in range(0, 30000, 100))


def numbers(seed: int) -> str:
    return "\n".join(" ".join(chosen(seed + i, 9, "0123456789")) for i in range(0, 30000, 100))


def short(seed: int) -> str:
    return f"x = {seed}\n" * 4


@pytest.mark.parametrize("make", [verse, one_line, chinese, numbers, short])
def test_documents_whose_lines_say_little_are_left_out_too(tmp_path, make):
    whole = make(1)
    for name, text in (("same", whole), ("other", make(2))):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{name}.txt").write_text(text, encoding="utf-8")
    test = tmp_path / "test.txt"
    part = whole[len(whole) // 3 : len(whole) // 2]
    wrapped = "\n".join(whole[i : i + 31] for i in range(0, len(whole), 31))
    for told in [whole, part, wrapped] if make != short else [whole]:
        test.write_text(told, encoding="utf-8")
        plan = texts.plan(encode, [tmp_path / "train"], 16, exclude=[test])
        assert plan.names == ["other.txt#0"] and plan.left_out == 1
    assert texts.plan(encode, [tmp_path / "train"], 16).left_out == 0


def test_a_licence_in_common_is_no_copy_but_a_wrapped_copy_is(tmp_path):
    licence, own = ("\n".join(" ".join(chosen(s + i, 12)) for i in range(n)) for s, n in ((0, 20), (1000, 80)))
    path, test = tmp_path / "train.txt", tmp_path / "test.txt"
    path.write_text(f"{licence}\n{own}")
    test.write_text(" ".join(licence.split()))
    assert texts.plan(encode, [path], 16, exclude=[test]).left_out == 0
    test.write_text(" ".join(f"{licence} {own}".split()))
    with pytest.raises(UserError, match="no text is left"):
        texts.plan(encode, [path], 16, exclude=[test])


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for source, message in (("nowhere", "does not exist"), ("empty", "holds no text"), ("binary.txt", "holds no text")):
        with pytest.raises(UserError, match=message):
            texts.plan(encode, [tmp_path / source], 64)
    path = write(tmp_path, "a.txt", 5, "line")
    with pytest.raises(UserError, match="no text is left"):
        texts.plan(encode, [path], 64, exclude=[path])
