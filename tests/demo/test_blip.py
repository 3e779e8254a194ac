"""What the demonstration of BLIP calls a success; its steps are tested in test_main.py."""

import json

import pytest

from vlm.demo import blip

REACHED = {"captions/exact_match": 0.9433, "vqa/accuracy": 0.9467, "vqa_ranked/accuracy": 0.95, "captions/cider": 1.0}


@pytest.fixture
def story(monkeypatch, tmp_path):
    """Runs a demonstration whose evaluations find `metrics`: `story(run, metrics)`; gives the exit status."""

    def run(tell, metrics):
        monkeypatch.setattr("vlm.demo.scenes.prepare_scenes", lambda folder: folder)
        monkeypatch.setattr("vlm.demo.nlvr.prepare_nlvr", lambda source, folder: folder)
        monkeypatch.setattr(blip.steps, "check_checkout", lambda: None)
        monkeypatch.setattr(blip.steps, "python", lambda command: json.dumps(metrics))
        return tell(tmp_path)

    return run


def test_numbers_that_were_measured_are_a_success(story, capsys):
    assert story(blip.digits, REACHED) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.strip().splitlines()[-1]) == REACHED and "below" not in err


@pytest.mark.parametrize("name", blip.MARKS)
@pytest.mark.parametrize("value", [0.89, float("nan")])
def test_a_number_below_its_mark_is_none(story, name, value, capsys):
    assert story(blip.digits, REACHED | {name: value}) == 1
    assert f"{name} is {value:.4g}, below 0.9" in capsys.readouterr().err
    assert blip.missed(REACHED | blip.MARKS, blip.MARKS) == []


def test_nlvr_has_no_mark(story):
    assert story(lambda output: blip.nlvr(output, output), {"nlvr/accuracy": 0.5}) == 0
