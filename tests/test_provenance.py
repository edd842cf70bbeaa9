"""The provenance that a result records."""

from mup_moe.provenance import SOURCES, code_digest, source_digest


def test_a_source_digest_depends_on_names_contents_and_order(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    for path, text in {a: "x = 1", b: "x = 2", c: "x = 1"}.items():
        path.write_text(text)
    assert len({source_digest(paths) for paths in ([a], [b], [c], [a, b], [b, a], [])}) == 6


def test_the_sources_are_those_that_can_change_a_result():
    names = {path.name for path in SOURCES}
    assert {"moe.py", "transformer.py", "scaling.py", "trainer.py", "optimizer.py", "batches.py"} <= names
    assert not {"command.py", "figure.py", "load.py"} & names
    assert code_digest() == source_digest(SOURCES)
