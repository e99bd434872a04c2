"""Rewards of tests, in a file without imports: each reward worker loads it anew."""


def even_length(prompt, response, answer, entry):
    """Any model gets it half the time."""
    return float(len(response) % 2)


def length(prompt, response, answer, entry):
    return len(response) / 100


def by_answer(prompt, response, answer, entry):
    """Depends on everything that it is given."""
    letters = sum(map(ord, response))
    return (letters + int(answer or 0) + len(prompt) + int(entry["extra"])) % 97 / 96


def other_than_by_answer(prompt, response, answer, entry):
    return 1.0 - by_answer(prompt, response, answer, entry)
