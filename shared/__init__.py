"""What the services agree on: messages, bus, configuration, meshes, weights, engines, data, rewards, telemetry."""
