from llmsys.main import main

main()
