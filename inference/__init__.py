"""Plans and the controller that runs them while a model generates."""
