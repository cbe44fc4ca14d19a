import math

import pytest

from entropy_probe.results.note import Note, NoteKind, distinct

SEEN = NoteKind("test_seen", "{share:.1%} of {name} seen", "Look again.")


def test_a_note_has_its_words_and_its_numbers():
    note = SEEN(share=0.25, name="all")
    assert note == Note(code="test_seen", text="25.0% of all seen", remedy="Look again.", numbers={"share": 0.25})
    assert Note.model_validate_json(note.model_dump_json()) == note


def test_numbers_of_a_phrase_stand_beside_the_text_and_no_file_gets_one_that_is_not_finite():
    note = SEEN(share=math.inf, name="all 7", count=7)
    assert note.text == "inf% of all 7 seen"
    assert note.numbers == {"count": 7.0}


def test_values_are_those_of_the_text():
    with pytest.raises(KeyError, match="name"):
        SEEN(share=0.25)
    with pytest.raises(AssertionError, match="other"):
        SEEN(share=0.25, name="all", other="some")


def test_a_code_is_taken_once():
    with pytest.raises(AssertionError, match="two kinds of note are called test_seen"):
        NoteKind("test_seen", "", "")


def test_a_note_about_something_is_the_same_note():
    note = SEEN(share=0.25, name="all")
    about = note.about("update")
    assert about.text == "update: 25.0% of all seen"
    assert about.model_copy(update={"text": note.text}) == note


def test_notes_are_told_apart_by_what_they_say():
    once, again, other = SEEN(share=0.25, name="all"), SEEN(share=0.25001, name="all"), SEEN(share=0.5, name="all")
    assert [note.text for note in distinct([once, other, again])] == [once.text, other.text]
    assert distinct([once, other], known=[again]) == (other,)
