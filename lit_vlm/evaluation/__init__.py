"""Generation of answers, their scores, and images with their boxes."""
