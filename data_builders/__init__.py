"""Problems, rollouts, judges and rewriters: everything that turns questions into labelled text."""
