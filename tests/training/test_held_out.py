"""Test texts are taken by a seeded order, whole, and never from what quotes the training text."""

from moe_jax.training.corpus import Document
from moe_jax.training.held_out import choose


def words(seed: int, count: int = 400) -> str:
    return " ".join(f"w{seed}x{i * 7919 % 1000}" for i in range(count))


def test_what_quotes_the_training_text_is_left_out():
    quoted = words(50)
    documents = [Document(f"code/{i}", "code", words(i)) for i in range(6)]
    # A tenth of it is a quotation, broken into other lines.
    documents.append(Document("code/quoting", "code", words(9, 360) + "\n" + "\n".join(quoted.split()[:40])))
    documents.append(Document("docs/other domain", "docs", quoted))
    training = [Document("code/training", "code", f"before {quoted} after")]
    chosen = choose(documents, training, size=9_000)
    names = {document.name for document in chosen["code"]}
    assert "code/quoting" not in names and 2 <= len(names) <= 5
    assert sum(document.size for document in chosen["code"]) <= 9_150
    assert [document.name for document in chosen["docs"]] == ["docs/other domain"] and not chosen["prose"]
    assert chosen == choose(documents[::-1], training, size=9_000)
    assert chosen != choose(documents, training, seed=1, size=9_000)
