package lab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// namePrefix begins the name of everything that outlives a crash: <namePrefix><pid>-<what>.
const namePrefix = "imdsgate-e2e-"

// janitor removes a lab's namespaces and files when the process that made them is gone, however it went. It is a process
// of its own in a session of its own, so that neither a panic nor a Ctrl-C at the terminal stops it; it waits for the end of
// its standard input, which the kernel brings about.
type janitor struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

// Only processes inside the lab's own namespaces are ended.
const janitorScript = `cat >/dev/null
for n in /run/netns/"$1"*; do
	[ -e "$n" ] || continue
	ip netns pids "${n##*/}" 2>/dev/null | xargs -r kill -9
	umount -l "$n" 2>/dev/null
	rm -f "$n"
done
rm -rf "$2"`

func startJanitor(prefix, dir string) (*janitor, error) {
	cmd := exec.Command("/bin/sh", "-c", janitorScript, namePrefix+"janitor", prefix, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the lab's janitor: %w", err)
	}
	return &janitor{cmd: cmd, stdin: stdin}, nil
}

// close lets the janitor do its work and waits for it.
func (j *janitor) close() error {
	return errors.Join(j.stdin.Close(), j.cmd.Wait())
}

// removeStale removes what labs of dead processes left when even their janitor was killed.
func removeStale() error {
	var errs []error
	for _, glob := range []string{filepath.Join(namespaceDir, namePrefix+"*"), filepath.Join(os.TempDir(), namePrefix+"*")} {
		paths, err := filepath.Glob(glob)
		if err != nil {
			return err
		}
		for _, path := range paths {
			pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), namePrefix), "-")
			if _, err := strconv.Atoi(pid); err != nil {
				continue
			}
			if _, err := os.Stat("/proc/" + pid); err == nil {
				continue
			}
			if filepath.Dir(path) == namespaceDir {
				errs = append(errs, removeNamespace(path))
			} else {
				errs = append(errs, os.RemoveAll(path))
			}
		}
	}
	return errors.Join(errs...)
}
