"""The optimizer's next step: in closed form, by its own kernel on copies, or in the frozen geometry."""
