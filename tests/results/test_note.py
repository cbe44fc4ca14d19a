import pytest

from entropy_probe.results.note import Note, NoteKind

SEEN = NoteKind("test_seen", "{share:.1%} of {name} seen", "Look again.")


def test_a_note_has_its_words_and_its_numbers():
    note = SEEN(share=0.25, name="all")
    assert note == Note(code="test_seen", text="25.0% of all seen", remedy="Look again.", numbers={"share": 0.25})
    assert Note.model_validate_json(note.model_dump_json()) == note


def test_values_are_those_of_the_text():
    with pytest.raises(KeyError, match="name"):
        SEEN(share=0.25)
    with pytest.raises(AssertionError, match="other"):
        SEEN(share=0.25, name="all", other=1)


def test_a_code_is_taken_once():
    with pytest.raises(AssertionError, match="two kinds of note are called test_seen"):
        NoteKind("test_seen", "", "")
