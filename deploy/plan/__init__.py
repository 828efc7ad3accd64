"""What a recipe needs to run, whatever starts it: the launch plan, a pure function of the recipe."""

from deploy.plan.launch import CONTROLLER, Environment, LaunchPlan, Place, Process, launch_plan

__all__ = ["CONTROLLER", "Environment", "LaunchPlan", "Place", "Process", "launch_plan"]
