package pods

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// maxOpening bounds the watches being opened at a time. Hundreds at once would find no free stream on the one connection
	// there is and dial one each: 262 TLS handshakes were counted for 300 watches, where four connections do. Eight at a time dial
	// up to 19, four up to 9.
	maxOpening = 4
	// openTimeout ends the opening of a watch that the API server does not answer, and with it the wait of the others.
	openTimeout = 30 * time.Second
	// listTimeout is longer than an API server takes at most, which is a minute.
	listTimeout = 70 * time.Second
	// minWatch is client-go's.
	minWatch = 5 * time.Minute
	// usualEvent has room for most events; etcd takes no object that maxEvent has not.
	usualEvent, maxEvent = 4 << 10, 16 << 20
)

// follower watches one object by its name. A full node has hundreds of these, so it is made of little: one goroutine, which
// reads the stream itself, waits without a buffer and, by few and small frames, on a stack of 4 KiB. client-go's reflector, made
// for lists of any length, was measured at 86 KiB for each object.
type follower[O metav1.Object] struct {
	*following
	pods     *Pods
	used     *used
	list     runtime.Object
	decode   func(O) object
	selector string
	version  string // up to which the object is known; empty: not at all
	pauses   *wait.Backoff
	began    time.Time // the present watch

	seen   bool // in the present stream
	frames io.ReadCloser
	events runtime.Decoder
	object runtime.Decoder // in an event
}

// follow keeps u up to date until ctx is done.
func follow[O metav1.Object](ctx context.Context, p *Pods, resource string, u *used, list runtime.Object, decode func(O) object) {
	selector := fields.OneTermEqualSelector(metav1.ObjectNameField, u.name.Name).String()
	f := &follower[O]{
		following: newFollowing(resource, u.name.Namespace, selector),
		pods:      p, used: u, list: list, decode: decode, selector: selector,
	}
	defer p.failures.end(f.following)
	f.pauses = p.pauses()
	for ctx.Err() == nil {
		f.began = time.Now()
		f.pause(ctx, f.watch(ctx))
	}
}

// pause waits after a failure, and after streams that ended too soon to be the server's time for a watch.
func (f *follower[O]) pause(ctx context.Context, err error) {
	if err == nil && time.Since(f.began) > time.Second {
		f.pauses = f.pods.pauses()
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(f.pauses.Step()):
	}
}

// pauses are those between attempts to reach the API server: as client-go has them, 0.8 s to 1 min, jitter included.
func (p *Pods) pauses() *wait.Backoff {
	b := wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 7, Cap: 30 * time.Second}
	if p.backoff != nil {
		b = *p.backoff
	}
	return &b
}

// watch follows the object as long as one stream lasts. The stream begins with the object as it is now or, if the last one
// ended in order, where that did. An API server that knows no such streams is asked for a list first.
func (f *follower[O]) watch(ctx context.Context) error {
	end, err := f.begin(ctx)
	if err != nil {
		f.version = ""
		return err
	}
	defer end()
	for {
		_, err := f.frames.Read(nil) // here it waits
		if errors.Is(err, io.ErrShortBuffer) {
			err = f.next()
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			f.version = ""
			return err
		}
	}
}

// begin opens the stream of events, if need be after a list.
func (f *follower[O]) begin(ctx context.Context) (end func(), err error) {
	end, err = f.open(ctx)
	if status := apierrors.APIStatus(nil); f.version == "" && errors.As(err, &status) {
		if err = f.relist(ctx); err == nil {
			end, err = f.open(ctx)
		}
	}
	return end, err
}

// open opens the stream and returns, once the API server has agreed to it, what ends it.
func (f *follower[O]) open(ctx context.Context) (end func(), err error) {
	defer func() { f.pods.followed(ctx, f.following, "watch", err) }()
	select {
	case f.pods.opening <- struct{}{}:
		defer func() { <-f.pods.opening }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	stream, cancel := context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			if stream.Err() != nil {
				err = context.Cause(stream)
			}
			cancel(nil)
		}
	}()
	defer time.AfterFunc(f.pods.openTimeout, func() { cancel(noAnswer(f.pods.openTimeout)) }).Stop()

	seconds, atMost := f.pods.watchTime()
	o := &metav1.ListOptions{
		Watch: true, FieldSelector: f.selector, AllowWatchBookmarks: true, TimeoutSeconds: &seconds, ResourceVersion: f.version,
	}
	if f.version == "" {
		yes := true
		o.SendInitialEvents, o.ResourceVersionMatch = &yes, metav1.ResourceVersionMatchNotOlderThan
	}
	ns := f.used.name.Namespace
	url := f.pods.client.Get().Resource(f.resource).NamespaceIfScoped(ns, ns != "").VersionedParams(o, metav1.ParameterCodec).URL()
	req, err := http.NewRequestWithContext(stream, http.MethodGet, url.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON)
	resp, err := f.pods.client.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			resp.Body.Close()
		}
	}()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, apierrors.NewGenericServerResponse(resp.StatusCode, "watch", schema.GroupResource{Resource: f.resource}, f.used.name.Name, string(text), 0, true)
	}
	mediaType, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("content type of a watch: %w", err)
	}
	objects, events, framer, err := f.pods.negotiator.StreamDecoder(mediaType, params)
	if err != nil {
		return nil, err
	}
	resp.Request, resp.Header = nil, nil // 2 KB and more, a token among them, which would stay as long as the stream
	f.seen, f.frames, f.events, f.object = false, framer.NewFrameReader(resp.Body), events, objects
	overdue := time.AfterFunc(atMost, func() { cancel(nil) })
	return func() {
		overdue.Stop()
		cancel(nil)
		f.frames.Close()
	}, nil
}

// watchTime is for how long the API server is asked to keep a watch open, which differs so that not all end at once, and when one
// that it keeps open nevertheless is ended here: it may have gone silent, behind a proxy that has not.
func (p *Pods) watchTime() (seconds int64, atMost time.Duration) {
	d := p.minWatch + rand.N(p.minWatch)
	return int64(d.Seconds()), d + p.openTimeout
}

// next takes the event that has begun to come.
func (f *follower[O]) next() error {
	buf := f.pods.buffers.Get().(*bytes.Buffer)
	defer f.pods.buffers.Put(buf)
	buf.Reset()
	for {
		buf.Grow(usualEvent)
		n, err := f.frames.Read(buf.AvailableBuffer()[:buf.Available()])
		buf.Write(buf.AvailableBuffer()[:n])
		if errors.Is(err, io.ErrShortBuffer) && buf.Len() < maxEvent {
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	var e metav1.WatchEvent
	if _, _, err := f.events.Decode(buf.Bytes(), nil, &e); err != nil {
		return fmt.Errorf("read an event: %w", err)
	}
	o, err := runtime.Decode(f.object, e.Object.Raw)
	if err != nil {
		return fmt.Errorf("read the object of an event: %w", err)
	}
	return f.apply(watch.EventType(e.Type), o)
}

func (f *follower[O]) apply(kind watch.EventType, o runtime.Object) error {
	if kind == watch.Error {
		return apierrors.FromObject(o)
	}
	m, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	switch now, ours := f.facts(o); {
	case kind == watch.Bookmark:
		if m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" && !f.seen {
			f.set(object{})
		}
	case ours && kind == watch.Deleted:
		f.set(object{})
	case ours:
		f.seen = true
		f.set(now)
	}
	f.version = m.GetResourceVersion()
	return nil
}

// relist asks for the object as it is now. Version 0 may be answered from the past, and an object missing there would be taken
// for confirmed absent; for one object the exact answer is cheap.
func (f *follower[O]) relist(ctx context.Context) error {
	ns := f.used.name.Namespace
	list := f.list.DeepCopyObject()
	attempt, cancel := context.WithTimeout(ctx, f.pods.listTimeout)
	defer cancel()
	err := f.pods.client.Get().Resource(f.resource).NamespaceIfScoped(ns, ns != "").
		VersionedParams(&metav1.ListOptions{FieldSelector: f.selector}, metav1.ParameterCodec).Do(attempt).Into(list)
	f.pods.followed(ctx, f.following, "list", err)
	if err != nil {
		return err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return err
	}
	var present object
	err = meta.EachListItem(list, func(o runtime.Object) error {
		if now, ours := f.facts(o); ours {
			present = now
		}
		return nil
	})
	f.set(present)
	f.version = m.GetResourceVersion()
	return err
}

// facts are those of an object, if it is ours: selectors are the API server's, and it is not trusted with who is who.
func (f *follower[O]) facts(o runtime.Object) (object, bool) {
	t, ok := o.(O)
	if !ok || t.GetName() != f.used.name.Name || t.GetNamespace() != f.used.name.Namespace {
		return object{}, false
	}
	return f.decode(t), true
}

func (f *follower[O]) set(o object) {
	f.pods.update(func(c *change) { f.pods.seen(c, f.used, o) })
}
