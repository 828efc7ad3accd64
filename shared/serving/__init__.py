"""What a replica with an engine does whatever its role: takes leases and weights, generates, has the answers judged."""
