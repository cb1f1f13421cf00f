"""Page in the browser for a served model: pictures, questions with control tokens, and answers with their boxes."""
