"""Questions with contexts and answers, and their words, for the tests of run_squad.py."""

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "log", "tree", "who", "where"]
LETTERS = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
QUESTIONS = [
    ("who sat ?", "The cat sat on the mat .", ["The cat", "cat"]),
    ("where ran the dog ?", "a dog ran under the log , a bird flew on the tree .", ["under the log"]),
    ("where flew a bird ?", "a dog ran under the log , a bird flew on the tree .", ["the tree", "on the tree"]),
]


def rows(questions, repeat=1):
    """SQuAD's columns, with `number` as make_windows wants it."""
    questions = questions * repeat
    return {
        "id": [f"q{i}" for i in range(len(questions))],
        "title": ["t"] * len(questions),
        "context": [context for _, context, _ in questions],
        "question": [question for question, _, _ in questions],
        "answers": [{"text": g, "answer_start": [c.index(text) for text in g]} for _, c, g in questions],
        "number": list(range(len(questions))),
    }
