"""Engines that generate text: one interface (`base`), one module a backend, imported lazily by who runs it."""
