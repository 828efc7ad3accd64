"""What runs inside the images beside the services: how a container becomes a replica, and whether it is healthy."""
