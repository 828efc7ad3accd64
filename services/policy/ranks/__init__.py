"""A policy replica of several ranks: rank 0 is the service, the others are its children and do as it does.

    service (rank 0) --orders, frames--> member (rank n): the same call on its own trainer, in the same order
           ^                                |
           +---- answers, mesh reports -----+             collectives: between trainers alone, inside those calls

orders: what is asked and answered; channel: the sockets between; crew: rank 0's side, and the ranks' common end;
member: the other side; group: the process group inside the replica, and what is summed over it; meshes: groups across
replicas, one for each rank. Imports nothing by itself, so that a member is tied to its parent before torch loads.
"""
