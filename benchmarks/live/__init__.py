"""A real run, driven and watched from outside: started as a person does, judged by what it leaves.

`chaos`, `controller_kills` and `elastic` use it. Times come from the journal, metrics.jsonl, the logs and the kernel's
process table, which all tell the same clock.
"""
