"""Programs that try to leave their sandbox, or to be judged right without being so.

Every one of them defines (or tries to define) `f`, whose result is right only if the program got
what it must not get; {secret} stands for a file's path, {port} for a port that somebody listens on,
{outside} for a directory that exists, {parent} for the process that started it, {n} for a number.
"""

from __future__ import annotations

KINDS: dict[str, str] = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork once": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\n"
    "def f(): return {answer}",
    "threads": "import threading, time\nfor _ in range(100000):\n"
    "    threading.Thread(target=time.sleep, args=(60,)).start()\ndef f(): return 0",
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '30{n}'])\n"
    "def f(): return {answer}",
    "shell": "import os\nos.system('sleep 30{n} &')\ndef f(): return 0",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "one large array": "x = bytearray(1 << 4{n})\ndef f(): return {answer}",
    "endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(300)\ndef f(): return {answer}",
    "environment": "import os\ndef f(): return int(os.environ['SPMDRL_SECRET'])",
    "environment of the parent": "import os\n"
    "def f():\n    text = open('/proc/{parent}/environ').read()\n"
    "    return int(text.split('SPMDRL_SECRET=')[1].split('\\0')[0])",
    "read a file": "def f(): return int(open('{secret}').read())",
    "symlink": "import os\nos.symlink('{secret}', '/tmp/x{n}')\n"
    "def f(): return int(open('/tmp/x{n}').read())",
    "hard link": "import os\nos.link('{secret}', '/tmp/x{n}')\n"
    "def f(): return int(open('/tmp/x{n}').read())",
    "another root": "import os\ndef f(): return int(open('/proc/1/root{secret}').read())",
    "old root": "import os\ndef f():\n    d = os.open('/', os.O_RDONLY)\n    os.fchdir(d)\n"
    "    os.chroot('.')\n    return int(open('../../..{secret}').read())",
    "write outside": "open('{outside}/written{n}', 'w').write('x')\ndef f(): return {answer}",
    "write to python": "import json\nopen(json.__file__, 'a').write('#')\ndef f(): return {answer}",
    "fill the disk": "with open('/tmp/x', 'wb') as out:\n    while True:\n"
    "        out.write(bytes(1 << 20))",
    "network": "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 2)\n"
    "def f(): return int(s.recv(10))",
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
    "def f(): return 0",
    "kill all": "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(): return 0",
    "kill by number": "import os, signal\nos.kill({parent}, signal.SIGKILL)\n"
    "def f(): return {answer}",
    "trace": "import ctypes\nif ctypes.CDLL(None).ptrace(16, {parent}, 0, 0): raise OSError\n"
    "def f(): return {answer}",
    "mount": "import ctypes\nif ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None):\n"
    "    raise OSError\ndef f(): return {answer}",
    "new namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError\n"
    "def f(): return {answer}",
    "zombies": "import os\nfor _ in range(1000):\n    if os.fork() == 0:\n        os._exit(0)\n"
    "def f(): return {answer}",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\n"
    "    def __hash__(self): return {n}\ndef f(): return E()",
    "an int that equals everything": "class E(int):\n    def __eq__(self, other): return True\n"
    "def f(): return E({n})",
    "a clean exit": "import os\nos._exit(0)",
    "an exit in the call": "import os\ndef f(): os._exit(0)",
    "a patched assert": "import builtins\nclass A(Exception):\n    pass\n"
    "builtins.AssertionError = A\ndef f(): return {n}",
    "reading the tests": "import sys, gc\n"
    "def f():\n    for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and 'tests' in o: return int(o['tests'][0].split('==')[1])",
    "the tests' file": "def f(): return int(open('tests.py').read().split('==')[1])",
    "a verdict of its own": "import os\nfor d in range(3, 64):\n    try:\n"
    '        os.write(d, b\'{{"passed": 1, "total": 1, "failure": null}}\')\n'
    "    except OSError:\n        pass\ndef f(): return {n}",
    "a lie on the wire": "import gc, socket, json, struct\n"
    "m = json.dumps({{'value': {{'code': '__import__(\"os\")'}}}}).encode()\n"
    "def f():\n    for o in gc.get_objects():\n        if isinstance(o, socket.socket):\n"
    "            o.sendall(struct.pack('!I', len(m)) + m)\n    return {n}",
    "a deep value": "def f():\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a huge value": "def f(): return 'x' * (1 << 27)",
    "much output": "while True:\n    print('x' * 1000000)",
    "a pickle": "class P:\n    def __reduce__(self): return (exec, ('import os; os._exit(0)',))\n"
    "def f(): return P()",
}
