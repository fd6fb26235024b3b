package clustertest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
)

// DefaultName is the name of the cluster that make cluster brings up.
const DefaultName = "imdsgate-cluster"

// Options of a cluster or of one node's boot; cluster.sh says what they mean. Empty ones are its defaults. A cluster that is up
// keeps its own, and a node those of its first boot.
type Options struct {
	Name        string // clusters of different names live beside each other; empty: $CLUSTER, or DefaultName
	Nodes       int    // at first; 0: 2
	CNI         string
	ProxyMode   string
	Snapshotter string
	DualStack   bool
	Masquerade  bool
	Taints      string   // that kubelets register new Nodes with
	Boot        string   // file: a script, or a systemd unit
	Images      []string // names of the images in the nodes, such as pause and tools; nil: all
}

func (o Options) name() string { return cmp.Or(o.Name, os.Getenv("CLUSTER"), DefaultName) }

// runDir is where the cluster keeps its state.
func (o Options) runDir() string { return filepath.Join("/var/tmp", o.name()) }

func (o Options) env() []string {
	env := []string{"CNI=" + o.CNI, "PROXY_MODE=" + o.ProxyMode, "SNAPSHOTTER=" + o.Snapshotter, "TAINTS=" + o.Taints, "BOOT=" + o.Boot}
	if o.Nodes != 0 {
		env = append(env, "NODES="+strconv.Itoa(o.Nodes))
	}
	if o.Images != nil {
		var files []string
		for _, name := range o.Images {
			files = append(files, filepath.Join(cacheDir(), "images", name+".tar"))
		}
		env = append(env, "IMAGES="+strings.Join(files, " "))
	}
	if o.DualStack {
		env = append(env, "DUAL_STACK=1")
	}
	if o.Masquerade {
		env = append(env, "MASQUERADE=true")
	}
	return env
}

// cacheDir is where cluster.sh keeps what it builds.
func cacheDir() string {
	return filepath.Join(cmp.Or(os.Getenv("XDG_CACHE_HOME"), filepath.Join(os.Getenv("HOME"), ".cache")), "imdsgate-e2e")
}

// Cluster is one that is up. It is safe for concurrent use.
type Cluster struct {
	// Kube and Config are a cluster administrator's.
	Kube   kubernetes.Interface
	Config *rest.Config
	// Fabric steers and reads AWS and the real metadata endpoint.
	Fabric *control.Client

	top, bin, name, dir string
}

// Up brings a cluster up: its control plane and nodes, without imdsgate. What there is of it when it fails is returned with the error,
// for Down.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	top, err := module()
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		top: top, bin: filepath.Join(cacheDir(), "bin"), name: o.name(), dir: o.runDir(),
		Fabric: control.NewClient(filepath.Join(o.runDir(), "fabric.sock")),
	}
	if _, err := c.script(ctx, o.env(), "up"); err != nil {
		return c, err
	}
	if c.Config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return c, err
	}
	c.Config.QPS = -1
	c.Kube, err = kubernetes.NewForConfig(c.Config)
	return c, err
}

// Down removes the cluster and everything of it.
func (c *Cluster) Down(ctx context.Context) error {
	_, err := c.script(ctx, nil, "down")
	return err
}

// Kubeconfig is the file of a cluster administrator; it works on the machine itself.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

// module is the top of this checkout.
func module() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "e2e", "cluster", "cluster.sh")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("this is not inside a checkout of imdsgate")
}

// script runs cluster.sh.
func (c *Cluster) script(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.top, "e2e", "cluster", "cluster.sh"), args...)
	cmd.Env = append(append(os.Environ(), "CLUSTER="+c.name), env...)
	return output(cmd)
}

// output is what the program wrote to its standard output; an error tells the rest.
func output(cmd *exec.Cmd) (string, error) {
	// What it leaves running in the background must not keep its output open.
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &errs, 5*time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s%s", strings.Join(cmd.Args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// Build builds a static Go program of the module in dir into file. The arguments are those of go build.
func (c *Cluster) Build(ctx context.Context, file, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", file}, args...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	_, err := output(cmd)
	return err
}

// Kubectl runs kubectl and returns its output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(exec.CommandContext(ctx, filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...))
}

// Apply applies a manifest.
func (c *Cluster) Apply(ctx context.Context, manifest string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "kubectl"), "--kubeconfig", c.Kubeconfig(), "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	_, err := output(cmd)
	return err
}

// Exec runs a program in a pod's first container and returns its output.
func (c *Cluster) Exec(ctx context.Context, namespace, pod string, command ...string) (string, error) {
	return c.Kubectl(ctx, append([]string{"exec", "-n", namespace, pod, "--"}, command...)...)
}

// Namespace makes a Kubernetes namespace, or sets the annotations of the one that is there, and waits for its service account.
func (c *Cluster) Namespace(ctx context.Context, name string, annotations map[string]string) error {
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}
	_, err := c.Kube.CoreV1().Namespaces().Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = c.Kube.CoreV1().Namespaces().Update(ctx, object, metav1.UpdateOptions{})
	}
	if err == nil {
		_, err = c.Kubectl(ctx, "wait", "-n", name, "--for=create", "serviceaccount/default", "--timeout=30s")
	}
	return err
}

// ServiceAccount makes a service account or sets its annotations.
func (c *Cluster) ServiceAccount(ctx context.Context, namespace, name string, annotations map[string]string) error {
	object := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: annotations}}
	_, err := c.Kube.CoreV1().ServiceAccounts(namespace).Create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = c.Kube.CoreV1().ServiceAccounts(namespace).Update(ctx, object, metav1.UpdateOptions{})
	}
	return err
}

// Pods are the running pods of a namespace that a label selector matches, by the name of their node; one a node.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) (map[string]*corev1.Pod, error) {
	list, err := c.Kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	pods := map[string]*corev1.Pod{}
	for i, p := range list.Items {
		if p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning {
			pods[p.Spec.NodeName] = &list.Items[i]
		}
	}
	return pods, nil
}

// The chart's release.
const (
	Release          = "imdsgate"
	ReleaseNamespace = "kube-system"
)

// BuildDaemon builds the image of imdsgate from this checkout and loads it into every node.
func (c *Cluster) BuildDaemon(ctx context.Context) error {
	_, err := c.script(ctx, []string{"IMAGES=" + filepath.Join(cacheDir(), "images", "imdsgate.tar")}, "daemon")
	return err
}

// Load imports images into every node that is up.
func (c *Cluster) Load(ctx context.Context, files ...string) error {
	_, err := c.script(ctx, nil, append([]string{"load"}, files...)...)
	return err
}

// Install installs or upgrades the chart, with the values that it needs here and more of helm's arguments (--set …), and
// waits until the daemon is ready on every node.
func (c *Cluster) Install(ctx context.Context, args ...string) error {
	if _, err := c.Helm(ctx, append([]string{
		"upgrade", "--install", Release, filepath.Join(c.top, "deploy", "chart"), "-f", filepath.Join(c.top, "e2e", "cluster", "values.yaml"),
	}, args...)...); err != nil {
		return err
	}
	return c.Rollout(ctx)
}

// Rollout waits until the daemon of the present version is ready on every node.
func (c *Cluster) Rollout(ctx context.Context) error {
	_, err := c.Kubectl(ctx, "rollout", "status", "-n", ReleaseNamespace, "daemonset/"+Release, "--timeout=90s")
	if err != nil {
		logs, _ := c.Kubectl(ctx, "logs", "-n", ReleaseNamespace, "daemonset/"+Release, "--tail=20")
		err = fmt.Errorf("%w: %s", err, logs)
	}
	return err
}

// Uninstall opens every node and removes the chart, as its notes say.
func (c *Cluster) Uninstall(ctx context.Context) error {
	if err := c.Install(ctx, "--set", "mode=cleanup"); err != nil {
		return err
	}
	if _, err := c.Helm(ctx, "uninstall", Release); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "wait", "-n", ReleaseNamespace, "--for=delete", "pod", "-l", "app.kubernetes.io/name="+Release, "--timeout=60s")
	return err
}

// Helm runs helm in the release's namespace.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	helm := filepath.Join(c.bin, "helm")
	if _, err := os.Stat(helm); err != nil {
		return "", fmt.Errorf("%w: e2e/cluster/bins/build.sh helm", err)
	}
	return output(exec.CommandContext(ctx, helm, append([]string{"--kubeconfig", c.Kubeconfig(), "-n", ReleaseNamespace}, args...)...))
}
