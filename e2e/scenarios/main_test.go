package scenarios

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
)

// clusterName keeps this cluster apart from the one of `make cluster` and `make demo`.
const clusterName = "imdsgate-e2e"

const (
	script    = "../cluster/cluster.sh"
	chart     = "../../deploy/chart"
	namespace = "kube-system" // of the release: the cluster has the authority of AWS there
	release   = "imdsgate"
)

// lab is the cluster of all scenarios.
type lab struct {
	dir, bin, images string
	kube             kubernetes.Interface
	fabric           *control.Client
	before           map[int]string // rules of each node that never saw imdsgate
	image, probe     string         // archives of the daemon and of the probe
	daemonImage      string         // what the tag test.local/imdsgate:dev stands for
}

var shared *lab

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "[%5.1f s] %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	// An interrupted run leaves a cluster behind; with SCENARIOS_KEEP it stays for the next one.
	keep := os.Getenv("SCENARIOS_KEEP") != ""
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if !keep {
		defer func() {
			if _, err := cluster(context.Background(), nil, "down"); err != nil {
				say("remove the cluster: %v", err)
				code = 1
				return
			}
			say("the cluster is gone")
		}()
	}
	l, err := begin(ctx, say, keep)
	if l != nil {
		defer os.RemoveAll(filepath.Dir(l.probe))
	}
	if err != nil {
		say("%v", err)
		return 1
	}
	shared = l
	return m.Run()
}

func begin(ctx context.Context, say func(string, ...any), keep bool) (*lab, error) {
	say("building the images")
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	if _, err := cluster(ctx, nil, "images"); err != nil {
		return nil, err
	}
	l := &lab{
		dir: "/var/tmp/" + clusterName, bin: filepath.Join(cache, "imdsgate-e2e", "bin"), images: filepath.Join(cache, "imdsgate-e2e", "images"),
		before: map[int]string{},
	}
	image, err := command(ctx, nil, "../deploy/build-image.sh")
	if err != nil {
		return nil, err
	}
	image = strings.TrimSpace(image)
	image = image[strings.LastIndex(image, "\n")+1:]
	stamp, err := os.ReadFile(image + ".stamp")
	if err != nil {
		return nil, err
	}
	l.image, l.daemonImage = image, strings.TrimSpace(string(stamp))
	probe, err := l.probeImage(ctx)
	if err != nil {
		return l, err
	}
	l.probe = probe
	if !keep {
		if _, err := cluster(ctx, nil, "down"); err != nil {
			return l, err
		}
	}
	var images []string
	for _, name := range []string{"pause", "aws"} {
		images = append(images, filepath.Join(l.images, name+".tar"))
	}
	boot := "IMAGES=" + strings.Join(images, " ")
	say("starting the control plane and node 1: bridge CNI, kube-proxy in iptables mode")
	if _, err := cluster(ctx, []string{"NODES=1", boot}, "up"); err != nil {
		return l, err
	}
	say("starting node 2: ptp CNI, kube-proxy in nftables mode")
	if _, err := cluster(ctx, []string{"CNI=ptp", "PROXY_MODE=nftables", boot}, "node-up", "2"); err != nil {
		return l, err
	}
	if _, err := cluster(ctx, nil, "load", image, probe); err != nil {
		return l, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", l.dir+"/kubeconfig")
	if err != nil {
		return l, err
	}
	config.QPS = -1 // 80 pods at once
	if l.kube, err = kubernetes.NewForConfig(config); err != nil {
		return l, err
	}
	l.fabric = control.NewClient(l.dir + "/fabric.sock")
	for _, node := range []int{1, 2} {
		// A cluster that was kept has seen imdsgate; what it was like before is kept with it.
		file := fmt.Sprintf("%s/rules-node%d", l.dir, node)
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			var text string
			if text, err = rules(ctx, node); err == nil {
				b, err = []byte(text), os.WriteFile(file, []byte(text), 0o600)
			}
		}
		if err != nil {
			return l, err
		}
		l.before[node] = string(b)
	}
	say("the cluster is up")
	return l, nil
}

// probeImage builds the programs of the scenarios' pods and an image of nothing else.
func (l *lab) probeImage(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "scenarios-")
	if err != nil {
		return "", err
	}
	root, tar := filepath.Join(dir, "root"), filepath.Join(dir, "probe.tar")
	if err := os.MkdirAll(filepath.Join(root, "tmp"), 0o755); err != nil {
		return "", err
	}
	if _, err := command(ctx, []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", root+"/", "./probe", "./attacker"); err != nil {
		return "", err
	}
	if _, err := command(ctx, nil, "../cluster/mkimage.sh", root, "test.local/probe:1", tar, `["/probe"]`); err != nil {
		return "", err
	}
	return tar, nil
}

// command runs a program and returns what it printed.
func command(ctx context.Context, env []string, name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 5 * time.Second // a child of the script may hold the pipes
	err := cmd.Run()
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		text := errs.String()
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, text[max(0, len(text)-2000):])
	}
	return out.String(), nil
}

func cluster(ctx context.Context, env []string, args ...string) (string, error) {
	return command(ctx, append(env, "CLUSTER="+clusterName), script, args...)
}
