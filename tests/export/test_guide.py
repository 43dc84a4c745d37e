"""What the export guide says is so."""

import re
from pathlib import Path

from sluice_export.proof.proofs import PROOFS
from sluice_model import read_contract
from tests.export.forms import BEGIN, END, FORMS

GUIDE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()


def test_the_guides_example_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "guide", "exec"), {"__name__": "guide"})
    said = re.search(r"has: (\d+)", code)
    assert said and capsys.readouterr().out == f"{said[1]}\n"
    assert read_contract(Path("gestures.onnx")).state_size == int(said[1])


def test_the_guide_explains_every_proof_and_no_other(lstm_file):
    named = re.findall(r"^\| `((?:parity|leak|bits|drift)\.\w+)` \|", GUIDE, flags=re.MULTILINE)
    assert named == [proof.name for proof in read_contract(lstm_file.path).proofs]
    assert len(named) == len(PROOFS) + 1


def test_the_guide_has_the_figures_of_every_form_and_no_other():
    table = GUIDE[GUIDE.index(BEGIN) : GUIDE.index(END)]
    rows = re.findall(r"^\| (.+?) \| *\d+ \|", table, flags=re.MULTILINE)
    assert rows == list(FORMS)
