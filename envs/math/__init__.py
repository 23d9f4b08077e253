"""Mathematics: problems with an answer that the verifier checks; with a calculator and second attempts where wanted."""
