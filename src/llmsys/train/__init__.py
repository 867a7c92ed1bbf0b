"""The one training loop and what subsystems implement to take part in it (`protocols`); the task is `task.train`."""
