"""What `python -m bench.gpu` says without a GPU, and what it writes with one."""

import pytest

from bench import gpu


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    before = gpu.README.read_bytes()
    assert gpu.main([]) == 0
    said = capsys.readouterr().out
    assert said == "There is no GPU here that JAX or TensorFlow can use, so nothing was measured.\n"
    assert gpu.README.read_bytes() == before


def test_the_table_is_read_as_it_was_written_and_replaces_the_one_before() -> None:
    page = gpu.README.read_text()
    assert page.count(gpu.BEGIN) == page.count(gpu.END) == 1
    one = [gpu.Measured("A card, 1 GiB", "TF32", 512, 42.25, 97)]
    two = [gpu.Measured("A card, 1 GiB", "float32", 1, 3.0, 4)]
    two += [gpu.Measured("CPU, 2 cores", "float32", 1, 8.5)]
    assert gpu.read(gpu.written(page, one)) == one
    assert gpu.read(gpu.written(gpu.written(page, one), two)) == two
    assert gpu.written(page, two).partition(gpu.BEGIN)[0] == page.partition(gpu.BEGIN)[0]
    assert gpu.best(gpu.written(page, two)) == two[0]
    assert gpu.best(gpu.written(page, two[1:])) is None
    assert one[0].rate == pytest.approx(12118.3, rel=1e-3)


def test_the_model_is_measured_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that needs no GPU: the same calls, in the process that the command starts for it."""
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    measured = gpu.on_cpu([2])
    assert [each.batch for each in measured] == [2] and measured[0].rate > 0
