"""The rollout service: turns leases on prompt groups into sampled, rewarded groups (`python -m services.rollout`)."""
