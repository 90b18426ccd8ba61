"""Where a text may be cut so that it can be spoken in parts, all of it at once or as it arrives.

The text is seen as words (letters, digits, and the marks that combine with them) and the gaps between them. A cut lies
in a gap, and a gap is judged by three things: what stands before it, the gap itself, and the first character of the
next word. So a cut is certain, and its piece comes out, with that first character; the same text gives the same pieces
however it arrives. At most `2 * max_characters` are held.

How good a place to cut a gap is:

- PARAGRAPH: a blank line. Always cut, however short the piece.
- SENTENCE: `. ! ?` before whitespace, the full stops of other scripts also without it. Cut once the piece has
  `min_characters`. Closing quotes, brackets and emoji stay with the sentence they close.
- CLAUSE: `, ; : — –`, their kin in other scripts, a line's end, an ellipsis, and `! ?` before a small letter
  (`"Stop!" he said`). Cut in the first piece, so that speech starts soon, and where a piece would be too long.
- WEAK: a `.` before a small letter. Cut only where a piece would be too long and has no clause.

A piece that is still too long is cut at its last space that fits, then between two grapheme clusters, then anywhere.
Joining two sentences is hardly heard, cutting one is: what may be an abbreviation never ends a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import IntEnum

from aloud.errors import RequestError


@dataclass(frozen=True)
class SplitLimits:
    """How long pieces are, in characters; English is spoken at 12 to 15 a second, Chinese at 4 to 5.

    min_characters: a piece that is shorter is joined with the next, unless it ends a paragraph or the text, or the
        next word does not fit. 20 are 1.5 s; on less, a model has too little to find its tone.
    max_characters: no piece is longer. 200 are 15 s, 190 of CSM's 2048 positions, so that a voice and several pieces
        before it fit as well; of Chinese or of digits, the slowest to say, they are some 50 s, less than the 90 s that
        a request may last.
    first_min_characters: the first piece may end at a clause once it has as many, for its length is what a listener
        waits for. 10 are 0.7 s of speech: "Well, yes," but not "Well,". With
        `max_characters` or more, the first piece is like any other.
    """

    min_characters: int = 20
    max_characters: int = 200
    first_min_characters: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.min_characters <= self.max_characters or self.first_min_characters < 1:
            raise RequestError(
                f"A text cannot be split with {self}: give 1 <= min_characters <= max_characters, "
                "and first_min_characters of at least 1."
            )


class Grade(IntEnum):
    """How good a place to cut is; higher is better."""

    WEAK = 1
    CLAUSE = 2
    SENTENCE = 3
    PARAGRAPH = 4


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Marks of Unicode's Sentence_Terminal and Terminal_Punctuation, for scripts in everyday use. U+037E is Greek.
SENTENCE_MARKS = frozenset(".!?…‥‽⁇⁈⁉。！？．｡\u037e؟۔।॥։׃።፧፨။។៕།༎᠃᠉᙮܀")
CLAUSE_MARKS = frozenset(",;:—–―、，；：､،؛፣፤፥၊")
MARKS = SENTENCE_MARKS | CLAUSE_MARKS
ELLIPSES = frozenset("…‥")
DASHES = frozenset("—–―")
# These are also inside of words and names (main.py, http://), so they count only before whitespace.
NEEDS_SPACE = frozenset(".!?,;:–")
# These are also inside of numbers: 3.14, 10:30, 1914—1918.
IN_NUMBERS = frozenset(".,:—–．，：،")
CLOSERS = frozenset("\"'”’»«›‹)]}」』）］｝】〉》〕〗＂＇｣*_`~")
SPACED_CLOSERS = frozenset("»›”’)]}」』")  # also between whitespace; « opens there
OPENERS = "\"'“”„‘’‚«»‹›([{「『（*_`~¿¡-–—"
NO_BREAK_SPACES = frozenset("\u00a0\u202f\u2007")

# Abbreviations in common usage, without their last full stop. One in small letters is also meant with a capital.
# Single letters and letters with stops (J. R. R., U.S., e.g., z. B., p.m.) are known by their shape.
ABBREVIATIONS = (
    # English
    _words("Mr Mrs Ms Mx Dr Prof Rev Hon Gen Col Maj Capt Lt Sgt Gov Sen Rep St Mt Ft Jr Sr Esq Ph.D M.Sc B.Sc Inc Ltd")
    | _words("Co Corp Bros Ave Blvd Rd dept vs etc al approx cf")
    # German
    | _words("Hr Hrn Fr Frl Dipl Ing Mag Str Mio Mrd Tel bzw usw ca evtl ggf inkl exkl vgl sog geb gest")
    # French
    | _words("MM Mme Mmes Mlle Mlles Mgr Pr Ste Bd av env ex")
    # Spanish
    | _words("Sra Sres Sras Srta Dña Dra Dres Ud Uds Vd Vds Lic Arq EE UU EE.UU pág")
    # Italian, Dutch, Polish, Russian, Hindi: the most frequent
    | _words("Sig dott ecc dhr mevr bijv enz itd itp np др ул डॉ")
)
# Abbreviations only before a number: "No. 5", but "No. I think not."
BEFORE_NUMBER = _words("No Nos Nr Nrn Abs Art Bd Kap Abb Tab Ziff Fig Figs pp Vol vol Ch Sec Núm núm op") | _words(
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Okt Nov Dec Dez"
)
# After these a number of one or two digits is an ordinal: "am 3. Mai", "der 2. Weltkrieg"; but "It was 12. Then".
BEFORE_GERMAN_ORDINAL = _words("am der die das den dem des im vom zum zur bis beim seit jeder jeden ihr sein")

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n|\u2029")
_INITIALS = re.compile(r"[^\W\d_](?:[.-]{1,2}[^\W\d_])*")
_LIST_NUMBER = re.compile(r"\d{1,3}(?:\.\d{1,3})*")
# Longer than any abbreviation with the word before it.
_LOOK_BACK = 48


def split(text: str, limits: SplitLimits = SplitLimits()) -> list[str]:
    """The pieces of a text in order; none for a text of whitespace.

    The text is its pieces with nothing but whitespace before, between and after them; inside a piece nothing changes.
    No piece is empty, begins or ends with whitespace, or is longer than `limits.max_characters`. Each has a letter or
    a digit to say, unless the text has none or punctuation alone makes a piece too long.
    """
    splitter = Splitter(limits)
    return splitter.feed(text) + splitter.finish()


class Splitter:
    """`split` for a text that arrives in parts: all that `feed` and `finish` return is `split` of the whole text."""

    def __init__(self, limits: SplitLimits = SplitLimits()) -> None:
        self.limits = limits
        self._start()

    def _start(self) -> None:
        self._held: list[str] = []  # characters that are in no piece yet; the first is not whitespace
        self._word_end = 0  # where the last word in `_held` ends: 0 without one, and the gap after it begins here
        self._cuts: list[tuple[int, Grade]] = []  # places in `_held` that were not cut, in order
        self._line_start = True  # whether `_held` begins at the start of a line
        self._first = True  # no piece has come out yet

    def feed(self, part: str) -> list[str]:
        """The pieces that are certain with this part of the text."""
        pieces: list[str] = []
        maximum = self.limits.max_characters
        for character in part:
            held = self._held
            if character.isalnum():
                if self._word_end and self._word_end < len(held):
                    self._judge_gap(character, pieces)
                held.append(character)
                self._word_end = len(held)
                if self._word_end > maximum:
                    self._shorten(pieces)
            elif held or not character.isspace():
                if self._word_end and self._word_end == len(held) and _continues_word(character):
                    self._word_end += 1
                held.append(character)
                if len(held) > maximum and not 0 < len(held) - self._word_end <= maximum:
                    self._judge_gap("", pieces)
                    self._shorten(pieces)
            else:
                self._line_start |= character == "\n"
        return pieces

    def finish(self) -> list[str]:
        """The pieces that are left at the end of the text; afterwards a new text may begin."""
        pieces: list[str] = []
        held = self._held
        while held and held[-1].isspace():
            held.pop()
        if len(held) > self.limits.max_characters:
            self._judge_gap("", pieces)
            self._shorten(pieces)
        if held:
            pieces.append("".join(held))
        self._start()
        return pieces

    def _least(self) -> int:
        """The fewest characters of a piece that ends with a sentence."""
        least = self.limits.min_characters
        return min(least, self.limits.first_min_characters) if self._first else least

    def _judge_gap(self, after: str, pieces: list[str]) -> None:
        """Cut in the gap at the end of what is held, or remember where it could be cut.

        `after` is the next word's first character, or "" where it is unknown.
        """
        held, word_end = self._held, self._word_end
        if not 0 < word_end < len(held) or (word_end + 1 == len(held) and held[-1] == " "):
            return
        before = "".join(held[max(0, word_end - _LOOK_BACK) : word_end])
        place = _judge(before, "".join(held[word_end:]), after, self._line_start and word_end <= _LOOK_BACK)
        if place is None:
            return
        self._cuts.append((word_end + place[0], place[1]))
        while self._cuts and self._cuts[-1][0] > self.limits.max_characters:
            self._cut(self._best_cut(), pieces)
        if not self._cuts:
            return
        end, grade = self._cuts[-1]
        is_early = self._first and grade == Grade.CLAUSE and end >= self.limits.first_min_characters
        if grade == Grade.PARAGRAPH or (grade == Grade.SENTENCE and end >= self._least()) or is_early:
            self._cut(end, pieces)

    def _shorten(self, pieces: list[str]) -> None:
        """Cut until what is held is no more than one piece."""
        while len(self._held) > self.limits.max_characters:
            self._cut(self._best_cut(), pieces)

    def _best_cut(self) -> int:
        """Where to cut what is held, which is longer than a piece may be."""
        held, maximum = self._held, self.limits.max_characters
        fitting = [(grade, end) for end, grade in self._cuts if end <= maximum]
        long_enough = [place for place in fitting if place[1] >= self._least()]
        if long_enough:
            return max(long_enough)[1]
        # Not before the first word, or a piece would have nothing to say.
        word = next((place for place, character in enumerate(held) if character.isalnum()), 0) if self._word_end else 0
        spaces = (end for end in range(maximum, word, -1) if _breaks(held[end]) or held[end - 1] == "\u200b")
        between_words = max(next(spaces, 0), fitting[-1][1] if fitting else 0)
        if between_words:
            return between_words
        return next((end for end in range(maximum, 0, -1) if not _in_cluster(held, end)), maximum)

    def _cut(self, end: int, pieces: list[str]) -> None:
        """Make a piece of the first `end` characters held, and drop the whitespace after it."""
        held = self._held
        piece = "".join(held[:end])
        rest = end
        while rest < len(held) and held[rest].isspace():
            rest += 1
        self._line_start = "\n" in piece[len(piece.rstrip()) :] or "\n" in held[end:rest]
        pieces.append(piece.rstrip())  # not empty: what is held begins with no whitespace
        del held[:rest]
        self._word_end = max(0, self._word_end - rest)
        self._cuts = [(place - rest, grade) for place, grade in self._cuts if place > rest]
        self._first = False


def _judge(before: str, gap: str, after: str, line_start: bool) -> tuple[int, Grade] | None:
    """Where in a gap to cut and how good a place that is, or None.

    before: the end of the text up to the gap, at most `_LOOK_BACK` characters
    after: the first character of the word after the gap, or "" where it is unknown
    line_start: whether `before` begins at the start of a line
    """
    blank = _BLANK_LINE.search(gap)
    if blank:
        return len(gap[: blank.start()].rstrip()), Grade.PARAGRAPH
    end = _attached_end(gap)
    spaced = end < len(gap)
    mark = next((place for place in range(end - 1, -1, -1) if gap[place] in MARKS), -1)
    line_ends = "\n" in gap[end:]
    if mark < 0:
        return (end, Grade.CLAUSE) if line_ends else None
    character = gap[mark]
    in_number = character in IN_NUMBERS and before[-1].isdigit() and after.isdigit()
    if not spaced:
        if in_number or (character in NEEDS_SPACE and not (_is_wide(before[-1]) and _is_wide(after))):
            return None
        end = mark + 1
        while end < len(gap) and gap[end] in CLOSERS:
            end += 1
    if character in CLAUSE_MARKS:  # "3, 1999" and "1, 2, 3" are read in one breath
        return None if in_number and character == "," and not line_ends else (end, Grade.CLAUSE)
    if character in ELLIPSES or gap[max(0, mark - 1) : mark + 1] == "..":
        return end, Grade.SENTENCE if after.isupper() else Grade.CLAUSE
    if character == "." and mark == 0 and _is_abbreviation(before, after, line_start):
        return None
    if after.islower() and not _is_wide(character):
        return end, Grade.WEAK if character == "." and not line_ends else Grade.CLAUSE
    if "\u3040" <= after <= "\u309f" and _is_wide(character) and end > mark + 1:  # 「行く。」と言った goes on
        return end, Grade.CLAUSE
    return end, Grade.SENTENCE


def _attached_end(gap: str) -> int:
    """The end of what belongs to the text before the gap; the gap's length if it has no whitespace to cut at.

    That is what stands before the first whitespace, and marks, closing quotes and emoji between whitespace behind it
    on the same line: `Bonjour ! »`, `Well done! 🎉`.
    """
    end = start = 0
    while True:
        stop = next((place for place in range(start, len(gap)) if _breaks(gap[place])), len(gap))
        if start:
            if stop == len(gap) or not all(map(_closes, gap[start:stop])):
                return end
            if gap[start] in DASHES and not MARKS.isdisjoint(gap[:end]):  # a dash that opens the next sentence
                return end
        end = start = stop
        while start < len(gap) and gap[start] != "\n" and _breaks(gap[start]):
            start += 1
        if start == end or start == len(gap) or gap[start] == "\n":
            return end


def _is_abbreviation(before: str, after: str, line_start: bool) -> bool:
    """Whether the full stop after `before` belongs to its last word: an abbreviation, an ordinal, a list's number."""
    line = before.rpartition("\n")
    words = [word.lstrip(OPENERS) for word in line[2].split()]
    word = words[-1]
    if word in ABBREVIATIONS or word[:1].lower() + word[1:] in ABBREVIATIONS:
        return True
    if after.isdigit() and word in BEFORE_NUMBER:
        return True
    if _INITIALS.fullmatch(word) and not _is_wide(word[-1]):
        return True
    if len(words) == 1 and (line_start or line[1]):
        return _LIST_NUMBER.fullmatch(word) is not None
    if len(words) > 1 and len(word) <= 2 and word.isdigit() and after.isupper():
        return words[-2].lower() in BEFORE_GERMAN_ORDINAL and words[-3:-1] != ["I", "am"]
    return False


def _continues_word(character: str) -> bool:
    """Whether a character after a word belongs to it: marks that combine, joiners, signs of direction."""
    return character > "\x7f" and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def _closes(character: str) -> bool:
    """Whether a character between whitespace belongs to the text before it."""
    if character in MARKS or character in SPACED_CLOSERS:
        return True
    return character > "\x7f" and unicodedata.category(character) in ("So", "Sk", "Mn", "Me", "Cf")


def _breaks(character: str) -> bool:
    """Whether a line may break at this whitespace."""
    return character.isspace() and character not in NO_BREAK_SPACES


def _is_wide(character: str) -> bool:
    """Whether a character is East Asian, of scripts without spaces between sentences."""
    return character >= "\u2e80"


def _in_cluster(held: list[str], place: int) -> bool:
    """Whether what one sees as one character goes across a place (grapheme clusters, Unicode Standard Annex 29)."""
    left, right = held[place - 1], held[place]
    if right <= "\x7f":
        return False
    if _continues_word(right) or left == "\u200d" or right in "\u0e33\u0eb3":  # Thai and Lao AM are written as two
        return True
    if "\U0001f3fb" <= right <= "\U0001f3ff":  # skin tones
        return True
    if "\ud800" <= left <= "\udbff" and "\udc00" <= right <= "\udfff":  # surrogates of a badly decoded text
        return True
    if "\u1160" <= right <= "\u11ff" or "\ud7b0" <= right <= "\ud7fb":  # Hangul in single letters
        return True
    if "\u1100" <= left <= "\u115f" and ("\u1100" <= right <= "\u115f" or "\uac00" <= right <= "\ud7a3"):
        return True
    if unicodedata.combining(left) == 9 and right.isalpha():  # a virama joins consonants
        return True
    if _is_flag_letter(left) and _is_flag_letter(right):  # two make a flag
        first = place
        while first and _is_flag_letter(held[first - 1]):
            first -= 1
        return (place - first) % 2 == 1
    return False


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
