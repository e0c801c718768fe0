from infer_patch.cli import main

main()
