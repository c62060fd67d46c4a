"""What a process may take of the machine."""

import pytest

from distill.hardware import default_cap


def test_under_wsl2_a_part_of_the_card_stays_free_and_a_note_says_why():
    cap, note = default_cap(8.0, "5.15.167.4-microsoft-standard-WSL2")
    assert cap == pytest.approx(7.2)
    assert note.startswith("WSL2: using at most 7.2 of 8.0 GiB") and "10 to 50 times slower" in note
    assert default_cap(8.0, "6.8.0-48-generic") == (8.0, "")
