"""Page in the browser for the records of a mixture, as the model will see them."""
