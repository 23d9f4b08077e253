"""The conformance kit: what every environment must do, as checks that say how to mend what they find."""
