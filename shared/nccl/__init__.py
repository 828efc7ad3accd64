"""NCCL's library by ctypes, without torch: found, loaded, asked for ids and communicators, every call of it polled.

By ctypes and not by a binding of its own, because what counts is *which* library it is: one file, loaded once in a
process, the same for torch and for us, and of one version in all processes of a run.
"""
