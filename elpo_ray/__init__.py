"""elpo_ray: Error-Localized Policy Optimization for tool-integrated reasoning agents."""
