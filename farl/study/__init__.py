"""The proof in small: does pre-training help where labels are few? `python -m farl.study`, see docs/study.md."""
