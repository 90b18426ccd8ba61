"""Where a text is cut, by example: languages and scripts, what is no boundary, long sentences, and how early."""

from __future__ import annotations

import pytest

from aloud.errors import RequestError
from aloud.text.split import SplitLimits, Splitter, split

# Every sentence is a piece of its own.
SENTENCES = SplitLimits(min_characters=1, max_characters=200, first_min_characters=200)
# Sentences of over 30 characters are cut.
SHORT = SplitLimits(min_characters=5, max_characters=30, first_min_characters=30)

# The text with ¦ where it is to be cut.
SENTENCE_CUTS = {
    "english": "It rained.¦ Did you see it?¦ No!¦ Well then.",
    "german": "Guten Tag.¦ Wie geht es Ihnen?¦ Über alles: gut!¦ Ärger gibt es nicht.",
    "french": "Bonjour !¦ « Ça va ? » dit-elle.¦ « Oui. »¦ Élise sourit…¦ Puis elle part.",
    "french, spaces that do not break": "«\u00a0Bonjour\u202f!\u00a0»¦ Elle part.¦ Quand\u00a0?¦ Demain.",
    "spanish": "¡Hola!¦ ¿Qué tal?¦ Bien, gracias.¦ ¿Y tú?¦ «Pues nada.»¦ Adiós.",
    "italian": "Ciao!¦ Come stai?¦ È tardi.¦ Vado a casa, ecc. Bene.",
    "russian": "Привет.¦ Как дела?¦ Хорошо!¦ Я дома.",
    "greek": "Γεια σου.¦ Τι κάνεις\u037e¦ Καλά.",
    "armenian": "Բարեւ։¦ Ինչպես ես։¦ Լավ։",
    "chinese": "你好。¦我叫小明！¦你呢？¦“我很好。”¦他说：“谢谢？！”¦然后走了。",
    "chinese, ASCII marks": "你好!¦我叫小明?¦好",
    "japanese": "おはよう。¦「行くよ。」と彼は言った。¦「本当？」¦彼女は笑った！¦そうか。",
    "japanese, half width": "ｵﾊﾖｳ｡¦ｿｳｶ｡",
    "korean": "안녕하세요.¦ 잘 지내요?¦ 네!",
    "arabic": "مرحبا.¦ كيف حالك؟¦ أنا بخير، شكرا!¦ وأنت؟",
    "urdu": "السلام علیکم۔¦ آپ کیسے ہیں؟¦ میں ٹھیک ہوں۔",
    "hebrew": "שלום.¦ מה שלומך?¦ טוב מאוד!",
    "hindi": "नमस्ते।¦ आप कैसे हैं?¦ डॉ. शर्मा ठीक हैं।¦ धन्यवाद॥¦ फिर मिलेंगे।",
    "amharic": "ሰላም።¦ እንዴት ነህ፧¦ ደህና፣ አመሰግናለሁ።",
    "burmese": "မင်္ဂလာပါ။¦ နေကောင်းလား။¦ ကောင်းပါတယ်။",
    "khmer": "សួស្តី។¦ អ្នកសុខសប្បាយទេ។",
    "thai, no marks at all": "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นกันเถอะ",
    # what closes a sentence stays with it
    "quotes": 'He said "Go."¦ She said “Why?”¦ ‘Because.’¦ "So," he went on, "be it!"¦ And so it was.',
    "speech goes on after its quote": '"Stop!" he cried.¦ “Why?” asked she.¦ "Because."¦ They left.',
    "german quotes": "„Komm!“ rief er.¦ »Warum?«¦ „Darum.“¦ Sie kam.",
    "brackets": "(So it is.)¦ [Really.]¦ And on (e.g. here) it goes.¦ (Yes!)",
    "markdown": "**Bold.**¦ *Thin!*¦ Then `code.`¦ And ~~gone.~~",
    "emoji": "Well done! 🎉👏🏽¦ Next one.🙂¦ Hi 👋 there.¦ Bye! 👨‍👩‍👧‍👦 🇩🇪",
    "marks together": "What?!¦ No!!!¦ Really?..¦ Yes…!¦ Fine.",
    "dialogue": "— Bonjour.¦ — Salut, dit-il.¦ — Oui !",
    # no boundaries
    "titles": "Dr. Smith met Mr. and Mrs. Jones, Prof. Lee, St. Peter.¦ They left.",
    "latin": "Fruit, e.g. Apples, i.e. Malus etc. And A vs. Bee.¦ Then",
    "letters with stops": "The U.S.A. has it at 5 p.m. Eastern.¦ The U.S. Army, Sammy Davis Jr. Senior, Acme Inc.",
    "initials": "J. R. R. Tolkien met J.-P. Sartre and George W. Bush.¦ They talked.",
    "german abbreviations": "Das ist z. B. Wasser, d. h. Nass, usw. Oder z.B. Eis bzw. Dampf, Nr. 5, Hr. Meier.¦ Gut.",
    "french abbreviations": "M. Dupont et Mme. Durand, p. ex. Paul.¦ Voilà.",
    "spanish abbreviations": "El Sr. López y la Sra. Ruiz de EE. UU. Y Ud. También.¦ Fin",
    "abbreviation in brackets": "He came (with Dr. No) at last (in the U.S.).¦ Then he left.",
    "a word that is an abbreviation before numbers": "Take No. 5 and Fig. 3.¦ No.¦ Never on Jan. 5, or in Dec.¦ Then?",
    "numbers": "Pi is 3.14, a million 1,000,000.¦ At 10:30 it was 1.2.3.¦ It was 1999.¦ Then came 2.¦ Three",
    "numbers, wide": "时间是１０：３０。¦圆周率３．１４。¦1999。¦好",
    "german ordinals": "Am 3. Mai, der 2. Weltkrieg, vom 1. bis 3. Juni.¦ Es war 1999.¦ Dann kam 5.¦ Und",
    "english before a number": "I am 30.¦ My friend is 12.¦ She knows.",
    "list": "1. First things.¦\n2. Second things.¦\n\n  3. Third\n10.1. Fourth",
    "names with stops": "See example.com or a.b@c.de, main.py and https://x.org/a?b=1!c.¦ Then .NET and v2.0.",
    "ellipses": "Well... maybe.¦ Or… not.¦ I wonder...¦ Then I know.",
    "small letters": "it is about approx. five, or so resp. six.¦ Yes",
    "no space": "It is wrong.But so it is.¦ Yes?",
    "apostrophes": "I don't.¦ You won't!¦ The dogs'.¦ Yes",
    # paragraphs
    "blank line": "A title¦\n\nThen text\nof two lines.¦\r\n \t\r\n\nEnd",
    "paragraph without words": "One.¦\n\n***\n\nTwo.¦\n\n🙂 Three\n\n***",
    "emoji on a line of their own": "One.¦\n🙂 \nTwo.",
    "a list after much whitespace": "Word" + "¦" + " " * 300 + "\n1. First things.¦ Then",
    "whitespace": "  \n One  thing.¦ \t\n Two.  ",
}


def cut(marked: str) -> tuple[str, list[str]]:
    return marked.replace("¦", ""), [piece.strip() for piece in marked.split("¦")]


@pytest.mark.parametrize("name", SENTENCE_CUTS)
def test_sentences(name: str) -> None:
    text, pieces = cut(SENTENCE_CUTS[name])
    assert split(text, SENTENCES) == pieces


LONG_CUTS = {
    "at the last clause that fits": "When it rains, it pours,¦ and now, says he,¦ the sun is there.",
    "after a semicolon, a colon": "It was late and dark;¦ so he said to them:¦ let us all go home now.",
    "at a dash": "There was a man — an old one —¦ who had no name at all—¦none that I knew.",
    "not inside of numbers": "They had 1,000,000 of them at¦ 10:30,¦ and of 1, 2, 3, 4, 5 they had¦ one.",
    "after a number at a line's end": "We had one, two and 3,¦\n4 of them, which is so.",
    "at a line's end": "Roses are so red¦\nViolets are very blue",
    "at a stop before a small letter": "so it is today.¦ and there is no more to say.",
    "at a quotation's end": "“Come with me!”¦ cried the old captain then.",
    "at spaces": "one two three four five six¦ seven eight nine ten eleven¦ twelve",
    "after an ellipsis": "I do not know...¦ maybe we should wait for it.",
    "chinese": "今天天气很好，我们一起去公园散步吧，然后去吃饭，¦晚上再回家看电视，你觉得这样好不好呢？",
    "japanese": "今日は天気がいいから、公園へ行きましょう、¦それから食事をして、夜は家に帰ってテレビを見ます。",
    "arabic": "اليوم الطقس جميل، سنذهب إلى،¦ الحديقة ثم نعود إلى البيت؛ معا",
    "thai, at spaces": "สวัสดีครับ วันนี้อากาศดีมาก¦ เราไปเดินเล่นกันเถอะ",
    "a word longer than a piece": f"See it:¦ {'a' * 30}¦{'a' * 10} and more",
    "a short clause before a long word": f"Well, yes,¦ {'a' * 30}¦{'a'}",
    "a sentence that ends at the limit": "It has exactly thirty letters.¦ It had.",
    "nothing of punctuation alone": f"- {'a' * 28}¦aa",
    "a sentence before much punctuation": f"你好。¦{'-' * 30}¦---",
    "at spaces without width": "สวัสดีครับ\u200bวันนี้อากาศ\u200b¦ดีมากเราไปเดินเล่น",
    "a quote that ends past the limit": 'He has said "one two three,¦ four five."¦ Then left.',
}


@pytest.mark.parametrize("name", LONG_CUTS)
def test_long_sentences(name: str) -> None:
    text, pieces = cut(LONG_CUTS[name])
    assert split(text, SHORT) == pieces


DEFAULT_CUTS = {
    "short sentences are joined": "Yes. No. I do not know it.¦ Why? Because it is so.¦ Well. Well.",
    "first clause": "Hello there,¦ my friend, it is a fine day.¦ And now, my friend, we are to go home.",
    "first clause too short": "Well, I have to think of that,¦ you know, and you too.",
    "no clause": "I have to think of that.¦ Do you mean it?",
    "short paragraph": "Introduction¦\n\nYes.¦\n\nNo, I said that I am here.",
}


@pytest.mark.parametrize("name", DEFAULT_CUTS)
def test_defaults(name: str) -> None:
    text, pieces = cut(DEFAULT_CUTS[name])
    assert split(text) == pieces


def test_first_piece_is_like_any_other_where_asked() -> None:
    text = "Hello there, my friend. And now we go home."
    limits = SplitLimits(first_min_characters=200)
    assert split(text, limits) == ["Hello there, my friend.", "And now we go home."]
    assert split("Hi there. And you?", SplitLimits(min_characters=1, first_min_characters=200)) == [
        "Hi there.",
        "And you?",
    ]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t\u3000\u00a0 "])
def test_nothing_to_say(text: str) -> None:
    assert split(text) == []


def arrivals(text: str, limits: SplitLimits) -> list[tuple[str, str]]:
    """Each piece with all of the text that had arrived when it came out; the whole text for what `finish` gave."""
    splitter = Splitter(limits)
    found = [(text[: index + 1], piece) for index in range(len(text)) for piece in splitter.feed(text[index])]
    return found + [(text, piece) for piece in splitter.finish()]


EARLY = SplitLimits(min_characters=5, max_characters=30, first_min_characters=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "Hello there, my friend. And",
            [
                ("Hello there, m", "Hello there,"),
                ("Hello there, my friend. A", "my friend."),
                ("Hello there, my friend. And", "And"),
            ],
            id="the next word's first letter",
        ),
        pytest.param(
            'I know. "And so on."',
            [('I know. "A', "I know."), ('I know. "And so on."', '"And so on."')],
            id="a quote may close what is before it or open what follows",
        ),
        pytest.param(
            "It is 3.14 or 3. Then",
            [("It is 3.14 or 3. T", "It is 3.14 or 3."), ("It is 3.14 or 3. Then", "Then")],
            id="a digit after a stop is no proof",
        ),
        pytest.param(
            "我是小明。你好",
            [("我是小明。你", "我是小明。"), ("我是小明。你好", "你好")],
            id="no space to wait for",
        ),
        pytest.param(
            "A title\n\nText",
            [("A title\n\nT", "A title"), ("A title\n\nText", "Text")],
            id="a paragraph",
        ),
        pytest.param(
            "one two three four five six seven",
            [
                ("one two three four five six sev", "one two three four five six"),
                ("one two three four five six seven", "seven"),
            ],
            id="a long sentence, with the character that does not fit",
        ),
    ],
)
def test_a_piece_comes_with(text: str, expected: list[tuple[str, str]]) -> None:
    assert arrivals(text, EARLY) == expected


def test_a_splitter_begins_anew_after_finish() -> None:
    text = "Hello there, my friend, it is a fine day. And 1. is"
    splitter = Splitter()
    first = splitter.feed(text) + splitter.finish()
    assert splitter.feed(text) + splitter.finish() == first == split(text)
    assert splitter.finish() == []


@pytest.mark.parametrize(
    ("minimum", "maximum", "first"), [(0, 10, 1), (11, 10, 1), (1, 0, 1), (1, 10, 0), (-5, -1, -1)]
)
def test_limits_that_make_no_sense(minimum: int, maximum: int, first: int) -> None:
    with pytest.raises(RequestError, match="give 1 <= min_characters <= max_characters"):
        SplitLimits(minimum, maximum, first)
