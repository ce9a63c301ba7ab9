"""When and where: the Prefect flow over the DVC graph. The only code that imports prefect."""
