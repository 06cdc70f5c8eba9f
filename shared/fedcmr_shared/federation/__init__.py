"""What server and sites say to each other during a round."""
