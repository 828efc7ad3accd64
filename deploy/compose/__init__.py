"""A run in containers: the same launch plan and the same supervisor as on this machine, each process in a container.

files      Dockerfile, compose.yaml, gpu.yaml: what a container is, whatever the recipe
project    what a run adds to them: its keys, its folder, commands and numbers from the launch plan
container  a container as the supervisor's child
docker     the docker command
"""

from deploy.compose.project import Project, check_images, containers

__all__ = ["Project", "check_images", "containers"]
