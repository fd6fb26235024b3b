package clustertest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// probeImage is the name of the image of e2e/scenarios/probe.
const probeImage = "test.local/probe:1"

// LoadProbe builds the image of the program that asks for credentials as SDKs do, and loads it into every node.
func (c *Cluster) LoadProbe(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	root, image := filepath.Join(dir, "root"), filepath.Join(dir, "probe.tar")
	if err := os.MkdirAll(filepath.Join(root, "tmp"), 0o755); err != nil {
		return err
	}
	if err := c.Build(ctx, filepath.Join(root, "probe"), filepath.Join(c.top, "e2e"), "./scenarios/probe"); err != nil {
		return err
	}
	mkimage := filepath.Join(c.top, "e2e", "cluster", "mkimage.sh")
	if _, err := output(exec.CommandContext(ctx, mkimage, root, probeImage, image, `["/probe"]`)); err != nil {
		return err
	}
	return c.Load(ctx, image)
}

// Steady is a pod that asks all the time, in full sequences. What it is answered stands in its log on the node, so nothing that
// happens to the API server keeps it from asking or the test from reading. It is safe for concurrent use.
type Steady struct {
	SteadyPod
	Created time.Time // just before

	file    string
	mu      sync.Mutex
	offset  int64
	results []sequence.Result
}

// SteadyPod says how a Steady asks.
type SteadyPod struct {
	Namespace, Name string
	ServiceAccount  string
	Role            string // ARN of the one that it should get
	Node            int
	Workers         int // each of which begins a sequence every Interval
	Interval        time.Duration
}

// StartSteady makes the pod and waits until its program runs.
func (c *Cluster) StartSteady(ctx context.Context, s SteadyPod) (*Steady, error) {
	one, no := int64(1), false
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name},
		Spec: corev1.PodSpec{
			ServiceAccountName: s.ServiceAccount, NodeName: c.Node(s.Node).Name, TerminationGracePeriodSeconds: &one, AutomountServiceAccountToken: &no,
			RestartPolicy: corev1.RestartPolicyNever,
			Tolerations:   []corev1.Toleration{{Operator: corev1.TolerationOpExists}}, // its node may be NotReady for a moment
			Containers: []corev1.Container{{
				Name: "main", Image: probeImage, ImagePullPolicy: corev1.PullNever, Args: []string{"steady", strconv.Itoa(s.Workers), s.Interval.String()},
			}},
		},
	}
	steady := &Steady{SteadyPod: s, Created: time.Now()}
	made, err := c.Kube.CoreV1().Pods(s.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	if _, err := c.Kubectl(ctx, "wait", "-n", s.Namespace, "pod/"+s.Name, "--for=jsonpath={.status.phase}=Running", "--timeout=60s"); err != nil {
		return nil, err
	}
	steady.file = filepath.Join(c.dir, c.Node(s.Node).Name, "varlog", "pods", fmt.Sprintf("%s_%s_%s", s.Namespace, s.Name, made.UID), "main", "0.log")
	return steady, nil
}

// Results are all answers so far, in the order in which they came.
func (s *Steady) Results() ([]sequence.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.read(); err != nil {
		return nil, fmt.Errorf("answers of %s/%s: %w", s.Namespace, s.Name, err)
	}
	return slices.Clip(s.results), nil
}

// read reads on where it was, up to the last whole line.
func (s *Steady) read() error {
	f, err := os.Open(s.file)
	if errors.Is(err, fs.ErrNotExist) && s.offset == 0 {
		return nil // nothing is answered yet
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(s.offset, io.SeekStart); err != nil {
		return err
	}
	for r := bufio.NewReader(f); ; {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.offset += int64(len(line))
		// CRI's form: TIME STREAM F|P TEXT. A result is far shorter than what is split.
		parts := bytes.SplitN(line, []byte(" "), 4)
		if len(parts) != 4 || string(parts[1]) != "stdout" || string(parts[2]) != "F" {
			return fmt.Errorf("not a line of a result: %q", line)
		}
		var result sequence.Result
		if err := json.Unmarshal(parts[3], &result); err != nil {
			return fmt.Errorf("%w: %q", err, line)
		}
		s.results = append(s.results, result)
	}
}

// Kill ends a program of the control plane at once: etcd, kube-apiserver, kube-controller-manager or kube-scheduler.
func (c *Cluster) Kill(ctx context.Context, program string) error {
	_, err := c.script(ctx, nil, "cp-kill", program)
	return err
}

// StartControlPlane starts the control plane's programs that do not run, and waits until the API server is ready.
func (c *Cluster) StartControlPlane(ctx context.Context) error {
	_, err := c.script(ctx, nil, "cp-start")
	return err
}

// ControlPlane runs a program in the control plane's network and returns its output.
func (c *Cluster) ControlPlane(ctx context.Context, command ...string) (string, error) {
	return c.script(ctx, nil, append([]string{"in", "cp"}, command...)...)
}

// Daemon is the process of the one daemon on the node, in its numbering; 0: there is none or more than one.
func (n *Node) Daemon(ctx context.Context) (int, error) {
	out, err := n.Run(ctx, "sh", "-c", "pgrep -xa imdsgate || true")
	if err != nil {
		return 0, err
	}
	found, count := 0, 0
	for line := range strings.Lines(out) {
		pid, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		if i, err := strconv.Atoi(pid); err == nil && !strings.Contains(args, "-probe") && !strings.Contains(args, "-guard-only") {
			found = i
			count++
		}
	}
	if count != 1 {
		found = 0
	}
	return found, nil
}

// VarLib is a directory of the machine that the node sees as /var/lib.
func (n *Node) VarLib() string { return filepath.Join(n.cluster.dir, n.Name, "varlib") }
