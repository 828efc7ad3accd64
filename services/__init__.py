"""The independent services of a run. None of them imports another; they share only `shared` and the messages."""
