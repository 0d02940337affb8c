"""The paper's tables by command: a recipe that measures, and a page that puts our figures beside the paper's."""
