"""The RL part of a recipe done three ways: by Orrery's services, by a loop written by hand, by TRL's trainer."""
