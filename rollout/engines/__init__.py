"""SGLang servers and the router in front of them: started, controlled and stopped as local processes."""
