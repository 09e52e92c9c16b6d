"""Fuzzing of every reader of other people's files, by hand and by the hour; pytest collects nothing here.

    pip install atheris
    python -m tests.fuzz pickle --minutes 10

A target ends in success or in a `BenchmarkError`. Anything else is a fault: another exception, a crash, an input that
takes more than five seconds or a gigabyte, a message of more than a few lines. What is found is kept as a test of the
smallest input that shows it, in `tests/test_hostile_pickles.py` or
`tests/test_hostile_files.py`.
"""
