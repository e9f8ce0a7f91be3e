"""Pictures of head statistics."""
