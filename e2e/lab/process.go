package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// bind shows a file or directory of the lab at another path, for one process.
type bind struct{ from, to string }

// command runs a program inside the namespace, in a mount namespace of its own with the binds. The environment is env alone.
// The process has the pid of the command: nsenter, unshare and sh each become the next.
func (n *Namespace) command(ctx context.Context, binds []bind, env []string, name string, args ...string) *exec.Cmd {
	var script strings.Builder
	for _, b := range binds {
		fmt.Fprintf(&script, "mount --bind '%s' '%s' && ", b.from, b.to)
	}
	script.WriteString(`exec "$@"`)
	argv := append([]string{
		"--net=" + n.Path(), "--", "unshare", "--mount", "--propagation", "private", "--",
		"sh", "-c", script.String(), "sh", name,
	}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", argv...)
	cmd.Env = env
	// A group of its own, ended as a whole; and with this process, whatever happens to it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		return err
	}
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// cleanEnv is the environment of every process in the lab before anything is added.
func cleanEnv(home string) []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + home, "LANG=C.UTF-8", "TERM=dumb",
	}
}

// process is a program that runs until it is ended.
type process struct {
	name string
	cmd  *exec.Cmd
	log  *Log
	done chan struct{}
	err  error // of Wait, once done is closed
}

// startProcess starts cmd; its output goes to log.
func startProcess(name string, cmd *exec.Cmd, log *Log) (*process, error) {
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, log: log, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		log.end()
		close(p.done)
	}()
	return p, nil
}

// PID is the process's own, by which /proc knows it.
func (p *process) PID() int { return p.cmd.Process.Pid }

// signal sends sig unless the process has ended.
func (p *process) signal(sig syscall.Signal) {
	select {
	case <-p.done:
	default:
		syscall.Kill(p.cmd.Process.Pid, sig)
	}
}

// kill ends the process and waits for its end.
func (p *process) kill() {
	if p == nil {
		return
	}
	p.signal(syscall.SIGKILL)
	<-p.done
}

// wait waits for the end.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of %s: %w", p.name, ctx.Err())
	}
}

// until asks ready every 20 ms: what a process does inside can only be asked for. It ends early when the process does.
func (p *process) until(ctx context.Context, what string, ready func(context.Context) error) error {
	var last error
	for {
		if last = ready(ctx); last == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v) before it was %s:\n%s", p.name, p.err, what, p.log.Tail(15))
		case <-ctx.Done():
			return fmt.Errorf("%s was not %s in time: %w:\n%s", p.name, what, last, p.log.Tail(15))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Log is what a process wrote. It keeps the last 8 MiB and is safe for concurrent use.
type Log struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{} // closed and replaced at every write
	ended   bool
}

func newLog() *Log { return &Log{changed: make(chan struct{})} }

// Write implements io.Writer.
func (l *Log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.buf.Len()+len(b) > 8<<20 {
		l.buf.Next(4 << 20)
	}
	l.buf.Write(b)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(b), nil
}

func (l *Log) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	close(l.changed)
	l.changed = make(chan struct{})
}

// String is all of it.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Tail is the last n lines.
func (l *Log) Tail(n int) string {
	lines := strings.SplitAfter(strings.TrimRight(l.String(), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// Wait waits until the log holds all of the texts in one line and returns that line.
func (l *Log) Wait(ctx context.Context, texts ...string) (string, error) {
	for {
		l.mu.Lock()
		changed, ended, all := l.changed, l.ended, l.buf.String()
		l.mu.Unlock()
	lines:
		for line := range strings.Lines(all) {
			for _, text := range texts {
				if !strings.Contains(line, text) {
					continue lines
				}
			}
			return line, nil
		}
		if ended {
			return "", fmt.Errorf("the process ended without saying %q:\n%s", texts, l.Tail(15))
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("wait for %q in the log: %w:\n%s", texts, ctx.Err(), l.Tail(15))
		}
	}
}
