package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// signal asks a loop for a check; several before it come to one.
type signal chan struct{}

func (s signal) raise() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// loop calls check for a signal, and every so often, but never twice within spacing. It ends with ctx.
func loop(ctx context.Context, s signal, spacing, every time.Duration, check func(context.Context)) {
	for {
		check(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(spacing):
		}
		select {
		case <-ctx.Done():
			return
		case <-s:
		case <-time.After(every):
		}
	}
}

// subscribe calls event for every netlink message of the groups until ctx is done. Lost messages count as one.
func subscribe(ctx context.Context, protocol int, groups []uint, event func(syscall.NetlinkMessage)) error {
	sock, err := nl.Subscribe(protocol, groups...)
	if err != nil {
		return fmt.Errorf("subscribe to netlink events: %w", err)
	}
	stop := context.AfterFunc(ctx, sock.Close)
	defer stop()
	event(syscall.NetlinkMessage{}) // what happened before the subscription
	for {
		msgs, _, err := sock.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			msgs = []syscall.NetlinkMessage{{}}
		case err != nil:
			sock.Close()
			return fmt.Errorf("receive netlink events: %w", err)
		}
		for _, m := range msgs {
			event(m)
		}
	}
}

// aboutUs reports whether an nftables event may concern our chains or their parents. kube-proxy changes other chains of the
// same tables all the time.
func aboutUs(m syscall.NetlinkMessage) bool {
	const name, chain = 1, 2 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE; NFTA_RULE_CHAIN. A chain's own name is 3
	attr := uint16(chain)
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		attr = 0
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		attr = 3
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return m.Header.Type == 0 // events were lost
	}
	if len(m.Data) < nl.SizeofNfgenmsg {
		return true
	}
	attrs, err := attributes(m.Data[nl.SizeofNfgenmsg:])
	if err != nil {
		return true
	}
	oneOf := func(v []byte, names ...string) bool {
		for _, n := range names {
			if string(bytes.TrimRight(v, "\x00")) == n {
				return true
			}
		}
		return false
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case name:
			if !oneOf(a.Value, "nat", "filter") {
				return false
			}
		case attr:
			if !oneOf(a.Value, "PREROUTING", "INPUT", chainName) {
				return false
			}
		}
	}
	return true
}

// watchDir calls event when a file is moved into the directory, until ctx is done.
func watchDir(ctx context.Context, dir string, event func()) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO|unix.IN_ONLYDIR); err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	event()
	for buf := make([]byte, 4096); ; {
		if _, err := f.Read(buf); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return fmt.Errorf("watch %s: %w", dir, err)
		}
		event()
	}
}
