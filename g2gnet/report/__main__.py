import sys

from g2gnet.report.program import main

sys.exit(main())
