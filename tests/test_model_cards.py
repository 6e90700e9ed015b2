"""The published cards are what their records say, and the records are of this version."""

from pathlib import Path

import pytest

from hf_coat.card import run_card
from hf_coat.record import read_run

RECORDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.json"))


def test_there_are_records():
    assert RECORDS


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_card_is_rendered_from_its_record(file):
    """After a change of the card's text: write ``run_card(read_run(file), file.stem)`` into the ``.md`` again."""
    assert file.with_suffix(".md").read_text(encoding="utf-8") == run_card(read_run(file), file.stem)
