"""On which node each rank of a replica runs, and how processes are started there.

Ranks follow each other node by node; the first node is that of rank 0, which starts all of them. Ranks of other nodes
are *far*: they share neither memory nor Unix sockets with rank 0.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass

from shared.config import RecipeError
from shared.network import address_of


@dataclass(frozen=True, slots=True)
class Nodes:
    """`names` has the node of each rank; `reach` is the command that starts one on "{node}"."""

    names: tuple[str, ...]
    reach: tuple[str, ...] = ()

    @classmethod
    def here(cls, world: int) -> Nodes:
        """All ranks on this node."""
        return cls(("",) * world)

    @classmethod
    def parse(cls, nodes: str, reach: str, world: int) -> Nodes:
        """From `--nodes a:4,b:4` (or `a,b`: as many on each) and `--reach "ssh {node}"`; RecipeError."""
        if not nodes:
            return cls.here(world)
        names: list[str] = []
        given = nodes.split(",")
        for entry in given:
            name, _, count = entry.strip().partition(":")
            even = str(world // len(given)) if world % len(given) == 0 else ""
            if not name or not (count or even).isdecimal():
                raise RecipeError(
                    f"--nodes {nodes!r}: expected NODE:RANKS, or as many nodes as divide the {world} ranks of "
                    f"policy.parallel, got {entry!r}; write for example a:4,b:4"
                )
            names += [name] * int(count or even)
        if len(names) != world:
            raise RecipeError(
                f"--nodes {nodes!r}: expected places for the {world} ranks of policy.parallel, got {len(names)}; "
                f"change either"
            )
        command = shlex.split(reach)
        if len(set(names)) > 1 and not any("{node}" in word for word in command):
            raise RecipeError(
                f'--reach {reach!r}: expected a command with {{node}} that starts another one on a node, such as "ssh '
                f'{{node}}" or "srun --overlap --ntasks=1 --nodes=1 --nodelist={{node}}"'
            )
        return cls(tuple(names), tuple(command))

    @property
    def far(self) -> frozenset[int]:
        """The ranks of other nodes than rank 0's."""
        return frozenset(rank for rank, name in enumerate(self.names) if name != self.names[0])

    def place(self, rank: int) -> int:
        """How many ranks of its node are before this one."""
        return self.names[:rank].count(self.names[rank])

    @property
    def here_too(self) -> int:
        """How many ranks are on rank 0's node, itself among them."""
        return self.names.count(self.names[0])

    def there(self, rank: int) -> tuple[str, ...]:
        """What stands before a command so that it runs on the node of this rank."""
        name = self.names[rank]
        return tuple(word.replace("{node}", name) for word in self.reach) if rank in self.far else ()


def address_for_nodes(interface: str) -> str:
    """This node's IPv4 address on the interface that nodes reach each other by; RecipeError for one that cannot be."""
    found = address_of(interface)
    if ipaddress.ip_address(found).is_loopback:
        raise RecipeError(
            f"weights.interface {interface!r}: expected one that other nodes reach, for the ranks that run there, got "
            f"{found}; set it to the interface of the nodes' network (`ip -4 address` lists them)"
        )
    return found
